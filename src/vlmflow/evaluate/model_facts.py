"""What records and prices need to know of a model, so that whoever keeps the rows need not hold it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from vlmflow.core.geometry import Geometry
from vlmflow.models import VLM


@dataclass(frozen=True)
class ModelFacts:
    """A model in few words; ``weights`` is their fingerprint, ``geometry`` None where its widths are not known."""

    name: str
    weights: str
    attends: tuple[bool, ...]  # of each layer
    dtype: str
    attention: str
    geometry: Geometry | None
    commit: str | None = None  # of the hub

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.attends)

    @classmethod
    def of(cls, vlm: VLM) -> ModelFacts:
        """Read them off a model."""
        model = vlm.model
        return cls(
            name=vlm.name,
            weights=fingerprint(model),
            attends=vlm.attends,
            dtype=str(model.dtype).removeprefix("torch."),
            attention=model.config.get_text_config(decoder=True)._attn_implementation,
            geometry=geometry_of(vlm),
            commit=vlm.commit,
        )


def geometry_of(vlm: VLM) -> Geometry | None:
    """The model's widths, None where they are not known."""
    try:
        return Geometry.from_config(vlm.model.config)
    except ValueError:
        return None


def fingerprint(model: nn.Module) -> str:
    """A digest of a few weights of every parameter: tells checkpoints apart without reading them whole."""
    digest = hashlib.sha256()
    for name, weight in list(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        few = (_offloaded(model, name) if weight.is_meta else weight).detach().flatten()[:16].float().cpu()
        digest.update(few.numpy().tobytes())
    return digest.hexdigest()


def _offloaded(model: nn.Module, name: str) -> torch.Tensor:
    """A weight that accelerate keeps in memory or on disk until its module runs."""
    from accelerate.utils import align_module_device

    owner, _, parameter = name.rpartition(".")
    module = model.get_submodule(owner)
    with align_module_device(module):
        return module.get_parameter(parameter)
