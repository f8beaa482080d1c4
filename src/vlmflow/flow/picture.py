"""Which patches of one image flow where, for one prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from vlmflow.flow.layers import Layers, named_layers
from vlmflow.flow.prediction import predict
from vlmflow.flow.saliency import saliency
from vlmflow.models import VLM, Question, patch_grids
from vlmflow.records.schema import Grid, SeenImages


@dataclass(frozen=True)
class Patches:
    """Importance of each image token's flow into the instruction and into the image tokens, in ``layers``.

    ``token`` is what the model would say next, the target of the saliency; ``inputs`` the encoded prompt, ``grids`` the
    rows and columns of each image's tokens, ``seen`` the same for records.
    """

    token: str
    inputs: Mapping[str, Any]
    layers: Layers
    grids: list[Grid]
    seen: SeenImages
    into_instruction: Float[Tensor, "layer image"]
    into_image: Float[Tensor, "layer image"]


def patches(vlm: VLM, question: Question, layers: Layers = ()) -> Patches:
    """Look at the prediction of a question's first answer token.

    Raises:
        ValueError: no image, a layer that the model has not, or a model whose image tokens form no grids.
    """
    layers = named_layers(layers, vlm.n_layers)
    prediction = predict(vlm, question, answer=None)
    (positions,) = prediction.layout.positions("image")
    grids = patch_grids(dict(prediction.inputs), vlm.model.config, len(positions), len(question.images))
    if grids is None:
        raise ValueError("no picture: this model's image tokens do not form one grid an image")
    found = saliency(vlm.model, prediction.inputs, prediction.target)
    flows = (found.patches(0, into)[list(layers)] for into in ("instruction", "image"))
    seen = SeenImages([image.size for image in question.images], positions.tolist(), grids)
    token = vlm.processor.tokenizer.decode([prediction.target])
    return Patches(token, prediction.inputs, layers, grids, seen, *flows)
