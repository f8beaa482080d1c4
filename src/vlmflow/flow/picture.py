"""Which patches of one image flow where, for one prompt."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vlmflow.flow.layers import Layers, named_layers
from vlmflow.flow.prediction import predict
from vlmflow.flow.saliency import saliency
from vlmflow.models import VLM, Question, seen_by, seen_images
from vlmflow.records.schema import SeenImages


@dataclass(frozen=True)
class Patches:
    """Importance of each image token's flow in ``layers``, by where it goes.

    ``token`` is what the model would say next, the target of the saliency; ``images`` are those that the model sees,
    ``seen`` says how they became tokens.
    """

    token: str
    layers: Layers
    images: list[Image.Image]
    seen: SeenImages
    flows: dict[str, Float[Tensor, "layer image"]]


def patches(vlm: VLM, question: Question, layers: Layers = ()) -> Patches:
    """Look at the prediction of a question's first answer token.

    Raises:
        ValueError: no image, or a layer that the model has not.
    """
    layers = named_layers(layers, vlm.n_layers)
    prediction = predict(vlm, question, answer=None)
    inputs, (positions,) = dict(prediction.inputs), prediction.layout.positions("image")
    seen = seen_by(vlm, question, inputs, positions.tolist())
    result = saliency(vlm.model, inputs, prediction.target)
    flows = {
        label: result.patches(0, into)[list(layers)]
        for label, into in (("into the instruction", "instruction"), ("into each other", "image"))
    }
    token = vlm.processor.tokenizer.decode([prediction.target])
    return Patches(token, layers, seen_images(inputs, question.images), seen, flows)
