"""What a score may look at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlmflow.core.attention import QueryRows, take_sequence


@dataclass(frozen=True)
class Sources:
    """Where the engine finds what a view shows: the sequence about to enter the stage's layer, and watched attention.

    ``image_in_states`` and ``image_in_keys`` are the image tokens' places in ``states`` and among the keys of ``rows``,
    which is None if the stage names no queries.
    """

    states: Float[Tensor, "batch length hidden"]
    image_in_states: Int[Tensor, "batch image"]
    image_in_keys: Int[Tensor, "batch image"]
    rows: QueryRows | None


@dataclass(frozen=True)
class View:
    """The image tokens that have survived so far, in prompt order.

    Samples with fewer image tokens than the largest are filled up on the left; ``valid`` is False there.
    ``ordinal`` numbers a sample's own image tokens from 0, dropped ones included; ``total`` is how many the sample
    had at the start, ``keep`` how many will stay. What the three properties show is computed when it is first asked
    for.
    """

    valid: Bool[Tensor, "batch image"]
    ordinal: Int[Tensor, "batch image"]
    total: tuple[int, ...]
    keep: tuple[int, ...]
    sources: Sources

    @cached_property
    def hidden(self) -> Float[Tensor, "batch image hidden"]:
        """Hidden states of the image tokens as they are about to enter the stage's layer."""
        return take_sequence(self.sources.states, self.sources.image_in_states)

    @cached_property
    def attention(self) -> Float[Tensor, "batch heads query image"]:
        """Attention weights of the stage's queries to the image tokens; 0 in rows that only fill up.

        Raises:
            ValueError: the stage names no queries.
        """
        weights = self._rows.weights()
        keys = self.sources.image_in_keys.to(weights.device)
        return torch.take_along_dim(weights, keys[:, None, None, :], dim=3)

    @cached_property
    def received(self) -> Float[Tensor, "batch image"]:
        """Attention that each image token receives: mean over heads, sum over the stage's queries.

        Raises:
            ValueError: the stage names no queries.
        """
        received = self._rows.received()
        return torch.take_along_dim(received, self.sources.image_in_keys.to(received.device), dim=1)

    @property
    def _rows(self) -> QueryRows:
        if self.sources.rows is None:
            raise ValueError("View: the stage names no queries, so there is no attention to look at")
        return self.sources.rows
