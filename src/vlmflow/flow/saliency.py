"""Saliency: how much each attention weight matters to the loss, summed over segments; no attention map is ever kept."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmflow.core.attention import QueryRows
from vlmflow.core.layout import SEGMENTS, Layout
from vlmflow.engine import TappedCall, attach
from vlmflow.engine.target import Target

Form = Literal["paper", "released"]
Answer = int | Sequence[int | Sequence[int]] | Int[Tensor, " batch"]

# Attention weights of one tile in the backward pass: 4 MB in float32 on the CPU, 64 MB elsewhere, a few times over.
_TILE_BUDGET = {"cpu": 1 << 20}
_LARGE_TILE_BUDGET = 1 << 24
_SYSTEM, _IMAGE, _INSTRUCTION = range(3)  # as SEGMENTS are ordered


@dataclass(frozen=True)
class Saliency:
    """Importance of information flow, by layer: from each position into each segment.

    ``flow[l, b, t, j]`` is the sum, over the queries i of segment t, of I_l(i, j): flow from position j of sample b
    into the segment. Segments are numbered as ``SEGMENTS``: system, image, instruction. Positions count from the left
    of the padded prompt; in teacher forcing the answer follows it, as part of the instruction.

    ``form`` is the quantity I: ``paper``, |sum over heads of A * dL/dA| (Eq. 1), or ``released``, the mean over heads
    of |A * A * dL/dA|, with the released script's sums. ``loss`` is that of each sample. ``maps`` are the whole
    I_l(i, j) of the layers that were asked for, on the CPU.

    The five measures are (layer, batch). A segment without tokens has no mean: its measure is nan.
    """

    form: Form
    layout: Layout
    loss: Float[Tensor, " batch"]
    flow: Float[Tensor, "layer batch segment position"]
    maps: Mapping[int, Float[Tensor, "batch query key"]]

    @cached_property
    def blocks(self) -> Float[Tensor, "layer batch target source"]:
        """Sums of I over queries of one segment (target) and keys of another (source), in float64."""
        members = _members(self.layout).double().to(self.flow.device)
        return torch.einsum("lbtj,bsj->lbts", self.flow.double(), members)

    @property
    def s_sys(self) -> Float[Tensor, "layer batch"]:
        """Importance of the flow from system tokens to all, per system token (Eq. 2).

        The released form sums rows instead of columns: the flow from all *to* system tokens.
        """
        return self._mean(_SYSTEM)

    @property
    def s_img(self) -> Float[Tensor, "layer batch"]:
        """Importance of the flow from image tokens to all, per image token (Eq. 3). The released form as in Eq. 2."""
        return self._mean(_IMAGE)

    @property
    def s_ins(self) -> Float[Tensor, "layer batch"]:
        """Importance of the flow from instruction tokens to all, per such token (Eq. 4). Released as in Eq. 2."""
        return self._mean(_INSTRUCTION)

    @property
    def s_vv(self) -> Float[Tensor, "layer batch"]:
        """Importance of intra-visual flow, from image tokens to image tokens, per image token (Eq. 5).

        The released form is the plain sum.
        """
        return self._from_image(_IMAGE)

    @property
    def s_vt(self) -> Float[Tensor, "layer batch"]:
        """Importance of visual-textual flow, from image tokens to the instruction, per image token.

        The released form is the plain sum.

        Source: Eq. 6.
        Departs: its indices say i in V, j in I, flow from the instruction into the image, which a causal mask forbids;
        the text says from the image into the instruction, and so does the released code.
        """
        return self._from_image(_INSTRUCTION)

    def patches(self, sample: int, into: str = "instruction") -> Float[Tensor, "layer image"]:
        """Importance of the flow from each image token of a sample into a segment: which patches mattered.

        Raises:
            ValueError: unknown segment.
        """
        if into not in SEGMENTS:
            raise ValueError(f"Saliency.patches: into must be one of {', '.join(SEGMENTS)}, got {into!r}")
        image = self.layout.image[sample].to(self.flow.device)
        return self.flow[:, sample, SEGMENTS.index(into)][:, image]

    def _mean(self, segment: int) -> Tensor:
        total = self.blocks[:, :, segment].sum(2) if self.form == "released" else self.blocks[..., segment].sum(2)
        return total / self._count(segment)

    def _from_image(self, segment: int) -> Tensor:
        total = self.blocks[:, :, segment, _IMAGE]
        return total if self.form == "released" else total / self._count(_IMAGE)

    def _count(self, segment: int) -> Float[Tensor, " batch"]:
        return _members(self.layout)[:, segment].double().sum(1).to(self.flow.device)


def saliency(
    model: nn.Module,
    inputs: Mapping[str, Any],
    target: Answer,
    *,
    over: Literal["first", "mean"] = "first",
    form: Form = "paper",
    record: Collection[int] = (),
    checkpointing: bool = False,
    loss_scale: float = 1.0,
) -> Saliency:
    """Importance of information flow, |sum over heads of A * dL/dA|, in every layer (Eq. 1), summed over segments.

    ``inputs`` are what the model's forward takes, one prompt or a left-padded batch. ``target`` is the answer: a token
    id, or for each sample a token id or a sequence of them. L is the cross-entropy of its first token, or with
    ``over="mean"`` the mean over its tokens, each given the ones before. A batch has each sample's own L, as if alone.

    ``record`` names layers whose whole maps are kept, on the CPU: (batch, query, key) in float32. ``checkpointing``
    recomputes each layer in the backward pass instead of keeping its activations (its q, k and v stay). A float16
    model's gradients may vanish: ``loss_scale`` multiplies L before the backward pass and divides after.

    >>> answer = int(model(**inputs).logits[0, -1].argmax())
    >>> result = saliency(model, inputs, target=answer)
    >>> bool(result.s_img[0] > result.s_img[-1])  # image tokens matter in the first layer more than in the last
    True

    How: A only feeds O = A V, so dL/dA = dL/dO V^T. The model's own kernel runs; a hook on its output gets dL/dO in
    the backward pass and, a few query rows at a time, computes A and dL/dA of all heads anew, reduces, and forgets.
    Memory grows linearly with the prompt, if the kernel's does: load with sdpa or flash attention, not eager. No
    weight gets a gradient: weights are frozen meanwhile, and the text embeddings, made a leaf, carry the graph.

    Source: Eq. 1; ``form="released"`` is what the released script computes instead.
    Departs: Eq. 1 leaves open which token L is about when the answer is text; the first, as the script has it, or all.

    Raises:
        TypeError: a model that the engine cannot serve.
        ValueError: an answer that is text, empty, outside the vocabulary or not one for each sample; a sample without
            image or without instruction; padding on the right; an unknown form, ``over`` or layer; a model in
            training mode, or one that already has a session.
    """
    if form not in ("paper", "released"):
        raise ValueError(f"saliency: form must be 'paper' or 'released', got {form!r}")
    if over not in ("first", "mean"):
        raise ValueError(f"saliency: over must be 'first' or 'mean', got {over!r}")
    if model.training:
        raise ValueError("saliency: the model is in training mode, where dropout would blur it; call model.eval()")
    served = Target.find(model)
    n_layers = len(served.layers)
    for layer in record:
        if not 0 <= layer < n_layers:
            raise ValueError(f"saliency: record names layer {layer}, but this model has layers 0 to {n_layers - 1}")
    answers = answers_of(target, inputs, served.core.config.get_text_config(decoder=True).vocab_size)
    if over == "first":
        answers = [answer[:1] for answer in answers]
    inputs, keep = extend(inputs, answers, served.family.answer_type), max(map(len, answers))
    collector, leaves = Collector(range(n_layers), form, record, loss_scale), list[Tensor]()

    def as_leaf(_module: nn.Module, _args: object, embeddings: Tensor) -> Tensor:
        leaves.append(embeddings.detach().requires_grad_())
        return leaves[-1].clone()  # into which image features are written; they go along

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for weight in model.parameters():
            if weight.requires_grad:  # a frozen one needs no activation to be kept
                stack.callback(weight.requires_grad_(False).requires_grad_)
        stack.enter_context(served.core.get_input_embeddings().register_forward_hook(as_leaf))
        for layer in served.layers if checkpointing else ():
            stack.enter_context(_recomputing(layer))
        trace = stack.enter_context(attach(model, taps=[collector]))
        logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits[:, -keep:]
        layout = trace.layout
        _check_segments(layout)
        each = zip(logits, answers, strict=True)
        losses = [F.cross_entropy(row[: len(ids)].float(), torch.tensor(ids, device=row.device)) for row, ids in each]
        loss = torch.stack(losses)
        (loss_scale * loss.sum()).backward(inputs=leaves)
    flow = torch.stack([collector.flow[layer] for layer in range(n_layers)])
    return Saliency(form, layout, loss.detach(), flow, collector.maps)


def answers_of(target: Any, inputs: Mapping[str, Any], vocabulary: int) -> list[tuple[int, ...]]:
    """One sequence of token ids for each sample, of what should be an ``Answer``.

    Raises:
        ValueError: text, not one answer for each sample, one without a token, or an id outside the vocabulary.
    """
    if inputs.get("input_ids") is None:
        raise ValueError("inputs hold no input_ids, by which image tokens are known; pass them")
    batch = len(inputs["input_ids"])
    if isinstance(target, Tensor):
        target = target.tolist()
    each = [target] * batch if isinstance(target, int | str) else list(target)
    if len(each) != batch:
        raise ValueError(f"target has {len(each)} answers for a batch of {batch}; give one for each sample")
    answers = [[answer] if isinstance(answer, int | str) else answer for answer in each]
    for sample, answer in enumerate(answers):
        if not len(answer):
            raise ValueError(f"target: the answer of sample {sample} has no token; leave the sample out")
        for token in answer:
            if isinstance(token, str):
                raise ValueError(
                    f"target must be token ids, got the text {token!r}; take those of likeliest(spellings(tokenizer, "
                    f"prompt, {token!r}), logits)"
                )
            if not 0 <= token < vocabulary:
                raise ValueError(
                    f"target: the answer of sample {sample} has token {token}, outside the vocabulary of "
                    f"{vocabulary}; encode it with the model's own tokenizer"
                )
    return [tuple(map(int, answer)) for answer in answers]


def extend(inputs: Mapping[str, Any], answers: Sequence[Sequence[int]], answer_type: int) -> dict[str, Any]:
    """Append all but the last token of each answer to its prompt; shorter answers are filled up with padding.

    ``answer_type`` is what the family's ``token_type_ids`` say of an answer.

    Raises:
        ValueError: prompts that are padded on the right, or come with position ids of their own where these are short.
    """
    ids: Tensor = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    if mask is not None and not bool(mask[..., -1].all()):
        raise ValueError("inputs are padded on the right; pad on the left, where prompts end together")
    more = max(map(len, answers)) - 1
    if not more:
        return dict(inputs)
    if inputs.get("position_ids") is not None:
        raise ValueError(
            "inputs give positions, of which the answer has none; leave position_ids out, or use over='first'"
        )
    filled = [[*answer[:-1], *[answer[0]] * (more + 1 - len(answer))] for answer in answers]
    real = [[1] * (len(answer) - 1) + [0] * (more + 1 - len(answer)) for answer in answers]
    extended = dict(inputs)
    extended["input_ids"] = torch.cat([ids, ids.new_tensor(filled)], 1)
    mask = torch.ones_like(ids) if mask is None else mask
    extended["attention_mask"] = torch.cat([mask, mask.new_tensor(real)], 1)
    if answer_type and inputs.get("token_type_ids") is None:
        extended["token_type_ids"] = torch.zeros_like(ids)
    for name, value in extended.items():
        if name not in ("input_ids", "attention_mask") and isinstance(value, Tensor) and value.shape == ids.shape:
            extended[name] = F.pad(value, (0, more), value=answer_type if name == "token_type_ids" else 0)
    return extended


class Collector:
    """A tap that lets every layer's kernel run, and sums up saliency when the gradient of its output comes back."""

    def __init__(self, layers: range, form: Form, record: Collection[int], loss_scale: float):
        self.layers = layers
        self.form: Form = form
        self.record = record
        self.loss_scale = loss_scale
        self.flow: dict[int, Tensor] = {}
        self.maps: dict[int, Tensor] = {}

    def __call__(self, call: TappedCall) -> tuple[Tensor, Any]:
        """Run the kernel, and wait for the gradient."""
        out, weights = call.kernel.run()
        out.register_hook(partial(self._backward, [call]))
        return out, weights

    @torch.no_grad()
    def _backward(self, waiting: list[TappedCall], gradient: Float[Tensor, "batch query heads channel"]) -> None:
        call = waiting.pop()  # so that its q, k and v go with the layer's other activations
        members = _members(call.layout).to(gradient.device)
        flow = torch.zeros_like(members)
        batch, _, n_position = members.shape
        if call.layer in self.record:
            self.maps[call.layer] = torch.zeros(batch, n_position, n_position)
        for first, importance in tiles(call, gradient, self.form):
            last, n_key = first + importance.shape[1], importance.shape[2]
            importance /= self.loss_scale
            flow[:, :, :n_key] += members[:, :, first:last] @ importance
            if call.layer in self.record:
                self.maps[call.layer][:, first:last, :n_key] = importance.cpu()
        self.flow[call.layer] = flow.cpu()


def tiles(
    call: TappedCall, gradient: Float[Tensor, "batch query heads channel"], form: Form
) -> Iterator[tuple[int, Float[Tensor, "batch row key"]]]:
    """I(i, j) of one layer, some query rows at a time: (first row, importance); keys left out see nothing there."""
    kernel, scoring = call.kernel, call.kernel.scoring
    query, key, value = kernel.query.detach(), kernel.key.detach(), kernel.value.detach()
    batch, heads, n_query, _ = query.shape
    kv_heads, n_key, channel = value.shape[1:]
    is_causal = kernel.mask is None or kernel.mask.dim() == 2
    gradient = gradient.transpose(1, 2)
    step = max(1, _TILE_BUDGET.get(query.device.type, _LARGE_TILE_BUDGET) // (batch * heads * n_key))
    for first in reversed(range(0, n_query, step)):  # from the largest tile on, whose memory the next ones can use
        last = min(n_query, first + step)
        end = last if is_causal else n_key  # what no row of the tile sees, nobody needs
        row = torch.arange(first, last, device=query.device).expand(batch, -1)
        valid = torch.ones_like(row, dtype=torch.bool)
        rows = QueryRows.take(query[:, :, :end], key[:, :, :end], kernel.mask, row, valid, scoring)
        attention = rows.weights()
        grouped = gradient[:, :, first:last].float().reshape(batch, kv_heads, -1, channel)
        slope = (grouped @ value[:, :, :end].float().transpose(2, 3)).reshape(attention.shape)
        product = attention * slope
        yield first, product.sum(1).abs() if form == "paper" else (product * attention).abs().mean(1)


def _members(layout: Layout) -> Float[Tensor, "batch segment position"]:
    """1 where a position belongs to a segment."""
    return torch.stack([layout.system, layout.image, layout.instruction], 1).float()


def _check_segments(layout: Layout) -> None:
    for segment, remedy in (
        ("image", "saliency follows visual information; leave text-only samples out"),
        ("instruction", "put the question behind the image"),
    ):
        flags: Tensor = getattr(layout, segment)
        if not (there := flags.any(1)).all():
            raise ValueError(f"saliency: sample {int((~there).nonzero()[0])} has no {segment} token; {remedy}")


@contextmanager
def _recomputing(layer: nn.Module) -> Iterator[None]:
    """Keep only what enters a layer; hooks stay outside and run once, whatever the version of transformers."""
    before = vars(layer).get("forward")  # some wrappers put their own on the instance
    layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before
