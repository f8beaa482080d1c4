"""FLOPs and KV bytes in closed form, under two conventions that every name carries; no torch.

``paper``: Eq. 10 of the HiMAP paper, 4nd² + 2n²d + 2ndm per layer for n image tokens. It counts
multiply-adds once, no text, no grouped queries, two of a gated MLP's three matrices, no lm_head, no score.
It counts every layer as an attention layer, recurrent ones too.
``exact``: twice the multiply-adds of every matrix product and convolution of the text decoder and lm_head. Norms,
softmax and rotary tables (an outer product of positions and frequencies) are not matrix products of activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal

from vlmflow.core.errors import refusal
from vlmflow.core.geometry import Geometry, Kind, Recurrence, Tower

Attention = Literal["full", "causal"]  # pairs counted: all, as dense kernels do, or the visible ones
Schedule = tuple[int, ...]  # image tokens that enter each decoder layer
CHUNK = 64  # tokens that the gated delta rule reads at once


@dataclass(frozen=True)
class Score:
    """One scored stage: ``queries`` rows of layer ``layer``'s q meet ``keys`` of its k, in every query head.

    ``peek`` tokens pass through that layer's q, k and v projections once more, ahead of the layer itself
    (PyramidDrop); 0 where the score reads a layer that runs anyway. Where the layer is recurrent, the attention layer
    before it ranks in its place as it runs: the same rows and keys, and no peek.
    """

    layer: int
    queries: int
    keys: int
    peek: int = 0


def make_schedule(layers: int, image_tokens: int, drops: Sequence[tuple[int, int]]) -> Schedule:
    """List the image tokens that enter each layer, from (layer, keep): ``keep`` stay before that layer runs.

    Raises: ValueError where the drops are out of order, outside the decoder, or keep more than there are.
    """
    counts, before = [image_tokens] * layers, -1
    for layer, keep in drops:
        if not before < layer < layers:
            wanted = f"layers that rise from one drop to the next and stay below {layers}"
            raise refusal("make_schedule", wanted, f"{layer} after {before}", "order the drops by layer")
        if not 0 <= keep <= counts[layer]:
            wanted = f"0 to {counts[layer]} image tokens to keep before layer {layer}"
            raise refusal("make_schedule", wanted, keep, "keep is a count that stays, not a share")
        counts[layer:] = [keep] * (layers - layer)
        before = layer
    return tuple(counts)


def _check(geometry: Geometry, schedule: Schedule, text_tokens: int, scores: Sequence[Score] = ()) -> None:
    if len(schedule) != geometry.layers:
        wanted = f"a schedule of {geometry.layers} counts, one per decoder layer"
        raise refusal("cost", wanted, len(schedule), "make_schedule(layers, image_tokens, drops) builds one")
    if min(*schedule, text_tokens) < 0:
        raise refusal("cost", "counts of at least 0", min(*schedule, text_tokens), "give counts of tokens")
    for layer, (now, then) in enumerate(pairwise(schedule), start=1):
        if then > now:
            wanted = f"at most {now} image tokens in layer {layer}"
            raise refusal("cost", wanted, then, "a schedule never rises: dropped tokens do not come back")
    for score in scores:
        if not 0 <= score.layer < geometry.layers:
            raise refusal("cost", f"a layer in 0 to {geometry.layers - 1}", score, "layers count from 0")
        tokens = text_tokens + schedule[max(0, score.layer - 1) if score.peek else score.layer]
        if min(score.queries, score.keys, score.peek) < 0 or max(score.queries, score.keys, score.peek) > tokens:
            wanted = f"0 to {tokens} tokens, as many as layer {score.layer}'s score can see"
            raise refusal("cost", wanted, score, "count one sample's own tokens, padding left out")


def paper_flops(geometry: Geometry, schedule: Schedule) -> int:
    """Count a prefill as Eq. 10 does: the sum over layers of 4nd² + 2n²d + 2ndm, image tokens only.

    Source: HiMAP, section 4.2. Departs: a mixture of experts' m is the width of its active experts together.
    """
    _check(geometry, schedule, 0)
    d, total = geometry.hidden, 0
    shared = geometry.intermediate if geometry.shared_expert else 0
    active = geometry.experts_per_token * geometry.expert_intermediate + shared
    for n, kind in zip(schedule, geometry.kinds, strict=True):
        m = active if kind.is_routed else geometry.intermediate
        total += 4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m
    return total


def _pairs(new: int, past: int, window: int | None, attention: Attention) -> int:
    """Count the query-key pairs of ``new`` tokens behind ``past`` ones, of which a cache may hold fewer."""
    if attention == "full":
        return new * (new + (past if window is None else min(past, window - 1)))

    def visible(tokens: int) -> int:
        inside = tokens if window is None else min(tokens, window)
        return inside * (inside + 1) // 2 + (tokens - inside) * inside

    return visible(past + new) - visible(past)


def _decoder_flops(g: Geometry, new: Sequence[int], past: Sequence[int], attention: Attention, logits: int) -> int:
    matrices = 3 if g.gated else 2
    total = 2 * logits * g.hidden * g.vocab
    for n, p, kind in zip(new, past, g.kinds, strict=True):
        mlp = matrices * g.intermediate
        if kind.is_routed:
            shared = mlp + 1 if g.shared_expert else 0  # with its gate
            mlp = g.experts + matrices * g.experts_per_token * g.expert_intermediate + shared  # router first
        total += 2 * n * g.hidden * mlp
        if g.recurrence is None or kind.attends:
            total += 2 * n * (_projections(g) + g.hidden * g.heads * g.head_dim)  # q, k and v, then o
            total += 4 * g.heads * g.head_dim * _pairs(n, p, kind.window, attention)  # q k^T, its product with v
        else:
            total += _recurrent_flops(g.recurrence, n, p)
    return total


def _projections(g: Geometry) -> int:
    """Count the multiply-adds that make a token's query, key and value, and its gate."""
    return g.hidden * g.head_dim * (g.heads * (2 if g.gated_attention else 1) + 2 * g.kv_heads)


def _recurrent_flops(r: Recurrence, new: int, past: int) -> int:
    """Count a recurrent layer without its MLP, as transformers' torch code runs it, for a prompt or one token more.

    The convolution also runs over the zeros around a prompt, and for a token over the one before. The gated delta rule
    reads a prompt in padded chunks: in each, three products of all pairs of tokens, and three with the state. Its
    triangular solve is no matrix product, nor is its step for one token, which goes element by element.

    Source: ``causal_conv1d_fn``, ``causal_conv1d_update`` and ``torch_chunk_gated_delta_rule`` in transformers 5.23's
    models/qwen3_5/modeling_qwen3_5.py, the first two also in models/lfm2/modeling_lfm2.py.
    """
    places = 2 if past else max(new, r.kernel) + r.kernel - 1
    chunks = 0 if past else -(-new // CHUNK)
    rule = CHUNK**2 * (2 * r.key_dim + r.value_dim) + 3 * CHUNK * r.key_dim * r.value_dim
    return 2 * (new * r.projections + places * r.kernel * r.channels + chunks * r.heads * rule)


def score_flops(geometry: Geometry, scores: Sequence[Score]) -> int:
    """Count what ranking costs: 2 x heads x head_dim x queries x keys per score, plus peeked projections."""
    products = sum(2 * geometry.heads * geometry.head_dim * score.queries * score.keys for score in scores)
    peeks = sum(score.peek for score in scores if geometry.kinds[score.layer].attends)
    return products + 2 * peeks * _projections(geometry)


def prefill_flops(
    geometry: Geometry,
    schedule: Schedule,
    text_tokens: int,
    *,
    scores: Sequence[Score] = (),
    attention: Attention = "full",
    logits: int = 1,
) -> int:
    """Count one sample's prefill exactly: decoder layers, lm_head at ``logits`` positions, and the scores.

    ``attention="causal"`` counts the pairs of a causal, windowed mask; Gemma 3 and PaliGemma, whose image
    tokens also see later ones, lie between it and ``"full"``. Recurrent layers cost the same either way.
    """
    _check(geometry, schedule, text_tokens, scores)
    tokens = [text_tokens + n for n in schedule]
    decoder = _decoder_flops(geometry, tokens, [0] * geometry.layers, attention, logits)
    return decoder + score_flops(geometry, scores)


def decode_flops(geometry: Geometry, schedule: Schedule, text_tokens: int, *, step: int = 1) -> int:
    """Count the cached forward pass that reads the ``step``-th new token (1: the one prefill produced)."""
    _check(geometry, schedule, text_tokens)
    if step < 1:
        raise refusal("decode_flops", "a step of at least 1", step, "step 1 reads the first new token")
    past = [text_tokens + n + step - 1 for n in schedule]
    return _decoder_flops(geometry, [1] * geometry.layers, past, "full", 1)


def kv_bytes(
    geometry: Geometry, schedule: Schedule, text_tokens: int, *, decoded: int = 0, dtype_bytes: int = 2
) -> tuple[int, ...]:
    """List the bytes of keys and values in each layer's cache after prefill and ``decoded`` further tokens.

    A layer with a sliding window keeps at most window - 1 tokens, as transformers' dynamic cache does. A recurrent
    layer holds none: its state has a fixed size, which no pruning changes.
    """
    _check(geometry, schedule, text_tokens)
    if decoded < 0 or dtype_bytes < 1:
        got = f"{decoded} and {dtype_bytes}"
        raise refusal("kv_bytes", "decoded >= 0 and dtype_bytes >= 1", got, "bfloat16 has 2 bytes")
    token = 2 * geometry.kv_heads * geometry.head_dim * dtype_bytes

    def slots(kind: Kind, tokens: int) -> int:
        if not kind.attends:
            return 0
        return tokens if kind.window is None else min(tokens, kind.window - 1)

    held = [text_tokens + n + decoded for n in schedule]
    return tuple(token * slots(kind, tokens) for kind, tokens in zip(geometry.kinds, held, strict=True))


def vision_flops(tower: Tower, grids: Sequence[tuple[int, int]]) -> int:
    """Count the vision tower exactly, given the (rows, columns) of patches of each image, tile or frame.

    Departs: pairs of patches from different images are not counted, though Pixtral's masked kernel runs them.
    """
    patches = [rows * columns for rows, columns in grids]
    tokens = [n + tower.class_tokens for n in patches]
    weights = 4 * tower.hidden**2 + (3 if tower.gated else 2) * tower.hidden * tower.intermediate
    wide, local = tower.layers, 0
    if (side := tower.window) is not None:
        wide = len(tower.full_layers)
        cells = [(a, b) for rows, columns in grids for a in _cuts(rows, side) for b in _cuts(columns, side)]
        local = sum((a * b) ** 2 for a, b in cells)
    pairs = wide * sum(n**2 for n in tokens) + (tower.layers - wide) * local
    embedding = tower.patch_inputs * tower.hidden * sum(patches)
    return 2 * embedding + 2 * tower.layers * weights * sum(tokens) + 4 * tower.hidden * pairs


def _cuts(length: int, side: int) -> list[int]:
    return [min(side, length - start) for start in range(0, length, side)]


def projector_flops(tower: Tower, grids: Sequence[tuple[int, int]]) -> int:
    """Count the projector (merger, connector) exactly, given the patches of each image, tile or frame."""
    return 2 * tower.projector * sum(rows * columns // tower.merge for rows, columns in grids)


@dataclass(frozen=True)
class Figures:
    """One run's figures, each a sum over samples; ``exact_flops`` (a prefill) includes ``score_flops``.

    ``layer_tokens`` sums image tokens over layers, ``decode_flops`` is one new token, ``kv_bytes`` by layer.
    """

    layer_tokens: int
    paper_flops: int
    exact_flops: int
    score_flops: int
    decode_flops: int
    kv_bytes: tuple[int, ...]

    def __add__(self, other: Figures) -> Figures:
        names = [field.name for field in fields(self) if field.name != "kv_bytes"]
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        held = tuple(a + b for a, b in zip(self.kv_bytes, other.kv_bytes, strict=True))
        return Figures(**sums, kv_bytes=held)


@dataclass(frozen=True)
class Cost:
    """What pruned samples cost, beside the same samples unpruned; ``a + b`` sums over samples.

    A share is pruned over unpruned: 1 where nothing was saved, or there was nothing to save. Vision tower and
    projector stand apart: a pruner inside the decoder leaves them as they are.
    """

    pruned: Figures
    unpruned: Figures
    attention: Attention
    dtype_bytes: int
    samples: int = 1
    vision_flops: int = 0
    projector_flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        mine = (self.attention, self.dtype_bytes, len(self.pruned.kv_bytes))
        theirs = (other.attention, other.dtype_bytes, len(other.pruned.kv_bytes))
        if mine != theirs:
            wanted = f"attention, dtype_bytes and layers {mine}"
            raise refusal("Cost", wanted, theirs, "add costs of one model and convention")
        return replace(
            self,
            pruned=self.pruned + other.pruned,
            unpruned=self.unpruned + other.unpruned,
            samples=self.samples + other.samples,
            vision_flops=self.vision_flops + other.vision_flops,
            projector_flops=self.projector_flops + other.projector_flops,
        )

    def table(self) -> dict[str, tuple[float, float, float]]:
        """Give each measure's figure unpruned and pruned, and the share: pruned over unpruned.

        Measures: mean_image_tokens (that enter a layer), paper_flops and exact_flops (of the prefill, score
        included), decode_flops (of one new token), kv_bytes (of all layers after the prefill).
        """
        whole, part = self._measures(self.unpruned), self._measures(self.pruned)
        return {name: (a, part[name], part[name] / a if a else 1.0) for name, a in whole.items()}

    def share(self, measure: str) -> float:
        """Return a measure's pruned figure over its unpruned one; `table` names the measures."""
        return self.table()[measure][2]

    def _measures(self, run: Figures) -> dict[str, float]:
        return {
            "mean_image_tokens": run.layer_tokens / (len(run.kv_bytes) * self.samples),
            "paper_flops": run.paper_flops,
            "exact_flops": run.exact_flops,
            "decode_flops": run.decode_flops,
            "kv_bytes": sum(run.kv_bytes),
        }

    def __str__(self) -> str:
        lines = [f"{name:18}{a:12.5g}{b:12.5g}{share:8.1%}" for name, (a, b, share) in self.table().items()]
        return "\n".join([f"{self.attention + ' attention':18}{'unpruned':>12}{'pruned':>12}{'share':>8}", *lines])

    def to_dict(self) -> dict[str, Any]:
        """Return every figure, and each measure's share, in JSON's own types."""
        return asdict(self) | {"shares": {name: share for name, (_, _, share) in self.table().items()}}


def cost_of(
    geometry: Geometry,
    schedule: Schedule,
    text_tokens: int,
    *,
    scores: Sequence[Score] = (),
    image_tokens: int | None = None,
    attention: Attention = "full",
    logits: int = 1,
    step: int = 1,
    dtype_bytes: int = 2,
    grids: Sequence[tuple[int, int]] = (),
) -> Cost:
    """Price one sample, pruned by ``schedule`` and unpruned with ``image_tokens`` (None: layer 0's).

    ``step`` is the new token whose decoding is counted; ``grids``, the patches of each image or tile, price
    the vision tower and projector (0 without them).

    >>> from vlmflow.core.geometry import geometry_named
    >>> schedule = make_schedule(layers=32, image_tokens=576, drops=[(2, 144)])
    >>> cost = cost_of(geometry_named("llava-1.5-7b"), schedule, text_tokens=60)
    >>> f"{cost.share('exact_flops'):.0%}"
    '36%'

    Raises: ValueError for counts that contradict each other, or grids where the geometry has no vision tower.
    """
    _check(geometry, schedule, text_tokens, scores)
    image_tokens = schedule[0] if image_tokens is None else image_tokens
    if image_tokens < schedule[0]:
        todo = "image_tokens counts them before any pruning"
        raise refusal("cost_of", f"image_tokens of at least {schedule[0]}", image_tokens, todo)
    if grids and geometry.vision is None:
        raise refusal("cost_of", "a geometry with a vision tower, as grids were given", None, "drop the grids")

    def figures(counts: Schedule, stages: Sequence[Score]) -> Figures:
        exact = prefill_flops(geometry, counts, text_tokens, scores=stages, attention=attention, logits=logits)
        return Figures(
            layer_tokens=sum(counts),
            paper_flops=paper_flops(geometry, counts),
            exact_flops=exact,
            score_flops=score_flops(geometry, stages),
            decode_flops=decode_flops(geometry, counts, text_tokens, step=step),
            kv_bytes=kv_bytes(geometry, counts, text_tokens, dtype_bytes=dtype_bytes),
        )

    return Cost(
        pruned=figures(schedule, scores),
        unpruned=figures((image_tokens,) * geometry.layers, ()),
        attention=attention,
        dtype_bytes=dtype_bytes,
        vision_flops=vision_flops(geometry.vision, grids) if geometry.vision else 0,
        projector_flops=projector_flops(geometry.vision, grids) if geometry.vision else 0,
    )
