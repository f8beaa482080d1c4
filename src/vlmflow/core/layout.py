"""Which prompt position belongs to which segment, read from the token ids alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

SEGMENTS = ("system", "image", "instruction")


@dataclass(frozen=True)
class Layout:
    """The segments of a batch of prompts: every position is system, image, instruction or padding.

    Image tokens are the placeholders of images and videos. System is the text before a sample's first image token
    (all text, in a sample without images), instruction the text after it; text between two images is instruction
    that has not yet seen the second one.

    Source: section 2.1, the index sets S, V and I.
    Departs: the paper's prompts hold one image; here samples may hold any number, or none.
    """

    image: Bool[Tensor, "batch length"]
    padding: Bool[Tensor, "batch length"]

    @classmethod
    def read(
        cls,
        input_ids: Int[Tensor, "batch length"],
        image_token_ids: Iterable[int],
        attention_mask: Tensor | None = None,
    ) -> Layout:
        """Read the layout from ids: a position is image if its id is one of ``image_token_ids``.

        ``attention_mask`` (batch, length) is 0 where a prompt is padded; None means that nothing is.

        >>> Layout.read(torch.tensor([[1, 5, 9, 9, 7]]), image_token_ids=[9]).positions("instruction")
        [tensor([4])]
        """
        image = torch.zeros_like(input_ids, dtype=torch.bool)
        for token_id in image_token_ids:  # by plain numbers: a list of them would be copied to the device
            image |= input_ids == token_id
        if attention_mask is None:
            return cls(image, torch.zeros_like(image))
        return cls(image & attention_mask.bool(), ~attention_mask.bool())

    @cached_property
    def system(self) -> Bool[Tensor, "batch length"]:
        """Text before the first image token."""
        return ~self.padding & (self.image.cumsum(1) == 0)

    @cached_property
    def instruction(self) -> Bool[Tensor, "batch length"]:
        """Text after the first image token."""
        return ~self.padding & ~self.image & (self.image.cumsum(1) > 0)

    @cached_property
    def question(self) -> Bool[Tensor, "batch length"]:
        """Instruction after the last image token: the text that sees every image."""
        return self.instruction & (self.image.flip(1).cumsum(1).flip(1) == 0)

    def positions(self, segment: str) -> list[Int[Tensor, " count"]]:
        """Positions of a segment (``system``, ``image``, ``instruction``), one tensor a sample, ascending.

        Raises:
            ValueError: for any other name.
        """
        if segment not in SEGMENTS:
            raise ValueError(f"Layout: segment must be one of {', '.join(SEGMENTS)}, got {segment!r}")
        flags: Tensor = getattr(self, segment)
        return [row.nonzero().flatten() for row in flags]
