"""What happened to the image tokens of the newest prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedConfig

from vlmflow.core.cost import Cost
from vlmflow.core.geometry import Geometry
from vlmflow.core.layout import Layout
from vlmflow.engine.narrow import Selection
from vlmflow.engine.prefill import Record
from vlmflow.pruners import Pruner


class Trace:
    """The record of the newest prompt with an image, whichever thread read it; before there is one, of the newest text.

    Layers are 0-based, and a layer's entry is what it saw: the tokens that entered it.

    Raises:
        RuntimeError: by every attribute, before the first prefill.
    """

    def __init__(self, config: PreTrainedConfig, pruner: Pruner, n_layers: int):
        self.pruner = pruner
        self.n_layers = n_layers
        self._config = config
        self._latest: Record | None = None

    def take(self, record: Record) -> None:
        """Remember a prefill that has ended."""
        if self._latest is None or any(record.selections[0].image_tokens) or not self.has_image:
            self._latest = record

    @property
    def has_image(self) -> bool:
        """Whether the prompt has image tokens."""
        return any(self._record.selections[0].image_tokens)

    @property
    def input_ids(self) -> Int[Tensor, "batch length"] | None:
        """The token ids of the prompt, by which to tell it; None where the model was given embeddings."""
        return self._record.ids

    @property
    def layout(self) -> Layout:
        """The prompt's segments."""
        return self._record.layout

    @property
    def kept(self) -> Kept:
        """Prompt positions of the image tokens that entered each layer: ``kept[layer][sample]``, ascending."""
        return Kept(self._record.selections)

    @property
    def image_tokens(self) -> tuple[tuple[int, ...], ...]:
        """Image tokens that entered each layer, by sample: ``image_tokens[layer][sample]``."""
        return tuple(selection.image_tokens for selection in self._record.selections)

    @property
    def tokens(self) -> tuple[tuple[int, ...], ...]:
        """Prompt tokens that entered each layer, padding not counted: ``tokens[layer][sample]``."""
        return tuple(selection.tokens for selection in self._record.selections)

    @property
    def kv_lengths(self) -> tuple[int, ...]:
        """Slots that each layer's KV cache held after the prefill, padding of ragged batches included.

        None in layers that are recurrent, or that read the keys and values of an earlier layer.
        """
        return self._record.kv_lengths

    def cost(self) -> Cost:
        """FLOPs and KV bytes of the prefill against the unpruned run's, all samples together (see ``costs``).

        >>> with prune(model, HiMAP()) as trace:
        ...     output = model.generate(**inputs, max_new_tokens=4)
        >>> f"{trace.cost().share('kv_bytes'):.0%}"
        '54%'
        """
        costs = self.costs()
        return sum(costs[1:], costs[0])

    def costs(self) -> list[Cost]:
        """FLOPs and KV bytes of each sample's prefill against the unpruned run's, padding not counted.

        Raises:
            ValueError: a model whose geometry is not known, or a prompt that was read on top of an earlier one.
        """
        if self._record.past:
            raise ValueError("Trace.cost: only a prompt read into an empty cache can be priced, this one had a past")
        geometry = Geometry.from_config(self._config)
        whole = self._record.selections[0]
        samples = zip(whole.tokens, whole.image_tokens, whole.question_tokens, strict=True)
        return [self.pruner.cost(geometry, image, tokens - image, question) for tokens, image, question in samples]

    @property
    def _record(self) -> Record:
        if self._latest is None:
            raise RuntimeError("Trace: no prompt has been read yet; run the model inside the session first")
        return self._latest


@dataclass(frozen=True, eq=False)
class Kept(Sequence[tuple[Int[Tensor, " count"], ...]]):
    """By layer and sample, the prompt positions of the image tokens that entered the layer."""

    selections: tuple[Selection, ...]

    def __len__(self) -> int:
        return len(self.selections)

    @overload
    def __getitem__(self, index: int) -> tuple[Tensor, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[Tensor, ...]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[layer] for layer in range(len(self))[index]]
        selection = self.selections[index]
        return tuple(positions[image] for positions, image in zip(selection.index, selection.image, strict=True))
