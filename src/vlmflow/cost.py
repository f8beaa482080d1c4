"""FLOPs and KV bytes in closed form, under two conventions that every name carries; no torch.

``paper``: Eq. 10 of the HiMAP paper, 4nd² + 2n²d + 2ndm per layer for n image tokens. It counts
multiply-adds once, no text, no grouped queries, two of a gated MLP's three matrices, no lm_head, no score.
``exact``: twice the multiply-adds of every matrix product of the text decoder and lm_head. Norms, softmax
and rotary tables (an outer product of positions and frequencies) are not matrix products of activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal

Attention = Literal[
    "full", "causal"
]  # pairs counted: every query and key, as dense kernels do, or visible ones
Schedule = tuple[int, ...]  # image tokens that enter each decoder layer

DECODERS = (  # text model_types whose layers are q, k, v and o projections and a gated MLP, routed or not
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text qwen2_vl_text qwen2_5_vl_text qwen3_vl_text "
    "qwen3_vl_moe_text glm4v_text"
)
TILED = "llava llava_next llava_onevision internvl idefics3 smolvlm mistral3 gemma3 paligemma"
DYNAMIC = "qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe glm4v"
CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0, "pixtral": 0}


def _refusal(who: str, wanted: str, got: object, todo: str) -> ValueError:
    return ValueError(f"{who}: wanted {wanted}, got {got}; {todo}")


@dataclass(frozen=True)
class Tower:
    """The widths that decide what a vision tower and its projector cost.

    ``patch_inputs`` values make a patch; ``merge`` patches make an image token, on which the projector spends
    ``projector`` multiply-adds. ``grid`` is a tile's (rows, columns) of patches where the model fixes it.
    With a ``window`` (side in patches) attention stays inside squares except in ``full_layers``. Pooling
    heads, which no multimodal model reads, are not counted.
    """

    hidden: int
    intermediate: int
    layers: int
    patch_inputs: int
    merge: int
    projector: int
    gated: bool = False
    class_tokens: int = 0
    grid: tuple[int, int] | None = None
    window: int | None = None
    full_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Geometry:
    """The widths that decide what a text decoder costs; its vision tower stands apart.

    ``windows`` holds each layer's sliding window in tokens (None: the layer sees all); empty means none.
    With ``experts``, every layer but ``dense_layers`` routes a token to ``experts_per_token`` MLPs of width
    ``expert_intermediate``.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    gated: bool = True
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    dense_layers: tuple[int, ...] = ()
    windows: tuple[int | None, ...] = ()
    vision: Tower | None = None

    @classmethod
    def from_config(cls, config: Any) -> Geometry:
        """Read the geometry of a Hugging Face config, multimodal or text only.

        Raises: ValueError where the family is not known or the config lacks an attribute.
        """
        whole = _Strict(config)
        text = _Strict(whole.optional("text_config") or config)
        if text.model_type not in DECODERS.split():
            raise _unknown(text, DECODERS)
        geometry = cls(
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads or text.num_attention_heads,
            head_dim=text.optional("head_dim") or text.hidden_size // text.num_attention_heads,
            vocab=text.vocab_size,
            windows=_windows(text),
            vision=None if whole.optional("vision_config") is None else _tower(whole, text.hidden_size),
        )
        if text.model_type != "qwen3_vl_moe_text":
            return geometry
        dense, step = text.mlp_only_layers or (), text.decoder_sparse_step
        return replace(
            geometry,
            experts=text.num_experts,
            experts_per_token=text.num_experts_per_tok,
            expert_intermediate=text.moe_intermediate_size,
            dense_layers=tuple(i for i in range(geometry.layers) if i in dense or (i + 1) % step),
        )

    def routed(self, layer: int) -> bool:
        """Tell whether this layer's MLP is a mixture of experts."""
        return self.experts > 0 and layer not in self.dense_layers

    def window(self, layer: int) -> int | None:
        """Return this layer's sliding window in tokens, None where it sees all."""
        return self.windows[layer] if self.windows else None


class _Strict:
    """A config whose missing attributes are errors that name the attribute and the config's class."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __getattr__(self, name: str) -> Any:
        if not hasattr(self.config, name):
            raise _refusal(
                "Geometry.from_config",
                f"the attribute {name!r}",
                f"a {type(self.config).__name__} without it",
                "pass the model's own config, or give Geometry(...) the widths by hand",
            )
        return getattr(self.config, name)

    def optional(self, name: str) -> Any:
        """Read an attribute for which transformers itself takes absent and None as one."""
        return getattr(self.config, name) if hasattr(self.config, name) else None


def _unknown(config: _Strict, known: str) -> ValueError:
    return _refusal(
        "Geometry.from_config",
        f"a model_type among {known.replace(' ', ', ')}",
        f"{config.model_type!r} in {type(config.config).__name__}",
        "give Geometry(...) the widths by hand",
    )


def _windows(text: _Strict) -> tuple[int | None, ...]:
    """List each layer's window by the rule of transformers' caches: layer_types, else one for all layers."""
    kinds = text.optional("layer_types")
    if kinds is None:
        windows = (text.optional("sliding_window"),) * text.num_hidden_layers
    elif other := set(kinds) - {"full_attention", "sliding_attention"}:
        known = "layer_types among full_attention, sliding_attention"
        raise _refusal("Geometry.from_config", known, sorted(other), "other kinds of layer are not modelled")
    else:
        windows = tuple(text.sliding_window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()


def _tower(config: _Strict, width: int) -> Tower:
    kind, vision = config.model_type, _Strict(config.vision_config)
    if kind in DYNAMIC.split():
        return _dynamic_tower(kind, vision)
    if kind not in TILED.split():
        raise _unknown(config, f"{TILED} {DYNAMIC}")
    hidden, patch = vision.hidden_size, _pair(vision.patch_size)
    rows, columns = (size // side for size, side in zip(_pair(vision.image_size), patch, strict=True))
    merge, gated, class_tokens = 1, False, int(kind == "internvl")
    if kind in ("llava", "llava_next", "llava_onevision", "mistral3"):
        depths = config.vision_feature_layer
        projector = hidden * (1 if isinstance(depths, int) else len(depths)) * width + width**2
        if kind == "mistral3":
            merge = config.spatial_merge_size**2
            projector += merge * hidden**2
    elif kind == "internvl":
        merge = int(1 / config.downsample_ratio) ** 2
        projector = merge * hidden * width + width**2
    elif kind in ("idefics3", "smolvlm"):
        merge = config.scale_factor**2
        projector = merge * hidden * width
    elif kind == "gemma3":
        merge, projector = rows * columns // config.mm_tokens_per_image, hidden * width
    else:  # paligemma
        projector = hidden * vision.projection_dim
    if kind not in ("internvl", "idefics3", "smolvlm"):  # the others may carry one of several towers
        if vision.model_type not in CLASS_TOKENS:
            raise _unknown(vision, " ".join(CLASS_TOKENS))
        class_tokens, gated = CLASS_TOKENS[vision.model_type], vision.model_type == "pixtral"
    return Tower(
        hidden=hidden,
        intermediate=vision.intermediate_size,
        layers=vision.num_hidden_layers,
        patch_inputs=vision.num_channels * patch[0] * patch[1],
        merge=merge,
        projector=projector,
        gated=gated,
        class_tokens=class_tokens,
        grid=None if gated else (rows, columns),
    )


def _dynamic_tower(kind: str, vision: _Strict) -> Tower:
    side, (height, breadth) = vision.spatial_merge_size, _pair(vision.patch_size)
    if kind == "qwen2_vl":  # hidden_size names the output here
        hidden, out, intermediate = (
            vision.embed_dim,
            vision.hidden_size,
            int(vision.embed_dim * vision.mlp_ratio),
        )
    else:
        hidden, out, intermediate = vision.hidden_size, vision.out_hidden_size, vision.intermediate_size
    projector = _merger(hidden, side, out)
    if kind == "glm4v":  # blocks are as wide as the output; intermediate_size belongs to the merger
        projector = side**2 * hidden * out + out**2 + 3 * out * intermediate
        intermediate = out
    elif kind in ("qwen3_vl", "qwen3_vl_moe"):
        projector *= 1 + len(vision.deepstack_visual_indexes)
    windowed = kind == "qwen2_5_vl"
    return Tower(
        hidden=hidden,
        intermediate=intermediate,
        layers=vision.depth,
        patch_inputs=vision.in_channels * vision.temporal_patch_size * height * breadth,
        merge=side**2,
        projector=projector,
        gated=kind in ("qwen2_5_vl", "glm4v"),
        window=vision.window_size // side // height * side if windowed else None,
        full_layers=tuple(vision.fullatt_block_indexes) if windowed else (),
    )


def _merger(hidden: int, side: int, out: int) -> int:
    return (hidden * side**2) ** 2 + hidden * side**2 * out


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


_CLIP = Tower(1024, 4096, 24, 588, 1, 1024 * 4096 + 4096**2, class_tokens=1, grid=(24, 24))
_CLIP_13B = replace(_CLIP, projector=1024 * 5120 + 5120**2)
_INTERN = Tower(1024, 4096, 24, 588, 4, 4096 * 3584 + 3584**2, class_tokens=1, grid=(32, 32))
_QWEN25 = Tower(1280, 3420, 32, 1176, 4, _merger(1280, 2, 3584), True, window=8, full_layers=(7, 15, 23, 31))
_QWEN3 = Tower(1152, 4304, 27, 1536, 4, 4 * _merger(1152, 2, 4096))
GEOMETRIES: dict[str, Geometry] = {
    "llava-1.5-7b": Geometry(4096, 11008, 32, 32, 32, 128, 32064, vision=_CLIP),
    "llava-1.5-13b": Geometry(5120, 13824, 40, 40, 40, 128, 32064, vision=_CLIP_13B),
    "qwen-vl-chat": Geometry(4096, 11008, 32, 32, 32, 128, 151936),  # its resampler is not modelled
    "qwen2.5-vl-7b": Geometry(3584, 18944, 28, 28, 4, 128, 152064, vision=_QWEN25),
    "qwen3-vl-8b": Geometry(4096, 12288, 36, 32, 8, 128, 151936, vision=_QWEN3),
    "internvl3-8b": Geometry(3584, 18944, 28, 28, 4, 128, 151674, vision=_INTERN),
}


def geometry_named(name: str) -> Geometry:
    """Return a built-in geometry.

    Raises: ValueError where there is none of this name.
    """
    if name not in GEOMETRIES:
        known = f"one of {', '.join(GEOMETRIES)}"
        raise _refusal(
            "geometry_named", known, repr(name), "use Geometry.from_config(config) for other models"
        )
    return GEOMETRIES[name]


@dataclass(frozen=True)
class Score:
    """One scored stage: ``queries`` rows of layer ``layer``'s q meet ``keys`` of its k, in every query head.

    ``peek`` tokens pass through that layer's q, k and v projections once more, ahead of the layer itself
    (PyramidDrop); 0 where the score reads a layer that runs anyway.
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
            raise _refusal("make_schedule", wanted, f"{layer} after {before}", "order the drops by layer")
        if not 0 <= keep <= counts[layer]:
            wanted = f"0 to {counts[layer]} image tokens to keep before layer {layer}"
            raise _refusal("make_schedule", wanted, keep, "keep is a count that stays, not a share")
        counts[layer:] = [keep] * (layers - layer)
        before = layer
    return tuple(counts)


def _check(geometry: Geometry, schedule: Schedule, text_tokens: int, scores: Sequence[Score] = ()) -> None:
    if len(schedule) != geometry.layers:
        wanted = f"a schedule of {geometry.layers} counts, one per decoder layer"
        raise _refusal("cost", wanted, len(schedule), "make_schedule(layers, image_tokens, drops) builds one")
    if min(*schedule, text_tokens) < 0:
        raise _refusal("cost", "counts of at least 0", min(*schedule, text_tokens), "give counts of tokens")
    for layer, (now, then) in enumerate(pairwise(schedule), start=1):
        if then > now:
            wanted = f"at most {now} image tokens in layer {layer}"
            raise _refusal("cost", wanted, then, "a schedule never rises: dropped tokens do not come back")
    for score in scores:
        if not 0 <= score.layer < geometry.layers:
            raise _refusal("cost", f"a layer in 0 to {geometry.layers - 1}", score, "layers count from 0")
        tokens = text_tokens + schedule[max(0, score.layer - 1) if score.peek else score.layer]
        if (
            min(score.queries, score.keys, score.peek) < 0
            or max(score.queries, score.keys, score.peek) > tokens
        ):
            wanted = f"0 to {tokens} tokens, as many as layer {score.layer}'s score can see"
            raise _refusal("cost", wanted, score, "count one sample's own tokens, padding left out")


def paper_flops(geometry: Geometry, schedule: Schedule) -> int:
    """Count a prefill as Eq. 10 does: the sum over layers of 4nd² + 2n²d + 2ndm, image tokens only.

    Source: HiMAP, section 4.2. Departs: a mixture of experts' m is the width of its active experts together.
    """
    _check(geometry, schedule, 0)
    d, total = geometry.hidden, 0
    for layer, n in enumerate(schedule):
        active = geometry.experts_per_token * geometry.expert_intermediate
        m = active if geometry.routed(layer) else geometry.intermediate
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


def _decoder_flops(
    g: Geometry, new: Sequence[int], past: Sequence[int], attention: Attention, logits: int
) -> int:
    query, key, matrices = g.heads * g.head_dim, g.kv_heads * g.head_dim, 3 if g.gated else 2
    total = 2 * logits * g.hidden * g.vocab
    for layer, (n, p) in enumerate(zip(new, past, strict=True)):
        mlp = matrices * g.intermediate
        if g.routed(layer):
            mlp = g.experts + matrices * g.experts_per_token * g.expert_intermediate  # router first
        total += 2 * n * g.hidden * (2 * query + 2 * key + mlp)  # q and o, k and v
        total += 4 * query * _pairs(n, p, g.window(layer), attention)  # q k^T and its product with v
    return total


def score_flops(geometry: Geometry, scores: Sequence[Score]) -> int:
    """Count what ranking costs: 2 x heads x head_dim x queries x keys per score, plus peeked projections."""
    query, key = geometry.heads * geometry.head_dim, geometry.kv_heads * geometry.head_dim
    products = sum(2 * query * score.queries * score.keys for score in scores)
    return products + sum(2 * score.peek * geometry.hidden * (query + 2 * key) for score in scores)


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
    tokens also see later ones, lie between it and ``"full"``.
    """
    _check(geometry, schedule, text_tokens, scores)
    tokens = [text_tokens + n for n in schedule]
    decoder = _decoder_flops(geometry, tokens, [0] * geometry.layers, attention, logits)
    return decoder + score_flops(geometry, scores)


def decode_flops(geometry: Geometry, schedule: Schedule, text_tokens: int, *, step: int = 1) -> int:
    """Count the cached forward pass that reads the ``step``-th new token (1: the one prefill produced)."""
    _check(geometry, schedule, text_tokens)
    if step < 1:
        raise _refusal("decode_flops", "a step of at least 1", step, "step 1 reads the first new token")
    past = [text_tokens + n + step - 1 for n in schedule]
    return _decoder_flops(geometry, [1] * geometry.layers, past, "full", 1)


def kv_bytes(
    geometry: Geometry, schedule: Schedule, text_tokens: int, *, decoded: int = 0, dtype_bytes: int = 2
) -> tuple[int, ...]:
    """List the bytes of keys and values in each layer's cache after prefill and ``decoded`` further tokens.

    A layer with a sliding window keeps at most window - 1 tokens, as transformers' dynamic cache does.
    """
    _check(geometry, schedule, text_tokens)
    if decoded < 0 or dtype_bytes < 1:
        got = f"{decoded} and {dtype_bytes}"
        raise _refusal("kv_bytes", "decoded >= 0 and dtype_bytes >= 1", got, "bfloat16 has 2 bytes")
    held = [text_tokens + n + decoded for n in schedule]
    caps = [geometry.window(layer) for layer in range(geometry.layers)]
    slots = [n if cap is None else min(n, cap - 1) for n, cap in zip(held, caps, strict=True)]
    return tuple(2 * geometry.kv_heads * geometry.head_dim * dtype_bytes * n for n in slots)


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
            raise _refusal("Cost", wanted, theirs, "add costs of one model and convention")
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
        return "\n".join(
            [f"{self.attention + ' attention':18}{'unpruned':>12}{'pruned':>12}{'share':>8}", *lines]
        )

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

    Raises: ValueError for counts that contradict each other, or grids where the geometry has no vision tower.
    """
    _check(geometry, schedule, text_tokens, scores)
    image_tokens = schedule[0] if image_tokens is None else image_tokens
    if image_tokens < schedule[0]:
        todo = "image_tokens counts them before any pruning"
        raise _refusal("cost_of", f"image_tokens of at least {schedule[0]}", image_tokens, todo)
    if grids and geometry.vision is None:
        raise _refusal(
            "cost_of", "a geometry with a vision tower, as grids were given", None, "drop the grids"
        )

    def figures(counts: Schedule, stages: Sequence[Score]) -> Figures:
        exact = prefill_flops(
            geometry, counts, text_tokens, scores=stages, attention=attention, logits=logits
        )
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


@dataclass(frozen=True)
class PaperRow:
    """A TFLOPs and a ratio cell of the paper's Tables 1 and 2, as printed and by Eq. 10 as stated.

    ``note`` names what prints a cell that the stated setting does not; empty where both cells agree.
    """

    table: int
    model: str
    method: str
    setting: str
    printed_tflops: str
    tflops: float
    printed_ratio: str
    ratio: float
    note: str


# table, model, image tokens, K1, K2 (R1 = 50 %, R2 = 75 %); TFLOPs and ratio of baseline, FastV and HiMAP
_PRINTED = (
    (1, "llava-1.5-7b", 576, 2, 8, "2.98 100%", "1.56 54%", "0.73 24%"),
    (1, "llava-1.5-13b", 576, 3, 8, "5.81 100%", "3.09 53%", "1.36 23%"),
    (1, "qwen-vl-chat", 256, 2, 8, "3.6 100%", "1.9 53%", "0.89 25%"),
    (2, "llava-1.5-7b", 576, 2, 15, "2.98 100%", "1.56 54%", "1.01 34%"),
    (2, "llava-1.5-13b", 576, 3, 15, "5.81 100%", "3.06 53%", "1.93 33%"),
)


def paper_tables() -> tuple[PaperRow, ...]:
    """Recompute the TFLOPs and ratio columns of the paper's Tables 1 and 2, and search what prints each cell.

    A cell agrees if the computed figure, cut or rounded to the printed decimals, is the printed one. Where it
    does not, each K is varied over all layers; where a model's baseline does not, its image tokens (8 to
    1,024) and MLP width (m and 2m) are, until all its TFLOPs agree at once. Qwen-VL's do for 448 tokens and
    m = 22016: its images are 448 pixels wide, and its config.json says 22016 where its MLP is 11008 wide.
    """
    rows = []
    for table, model, tokens, k1, k2, *printed in _PRINTED:
        geometry, cells = GEOMETRIES[model], [cell.split() for cell in printed]
        whole = _halved_tflops(geometry, tokens, ())
        runs = (("Baseline", ()), ("FastV", (2,)), ("HiMAP", (k1, k2)))
        other = ""
        if not _prints(whole, cells[0][0]):
            other = _other_sizes(geometry, [(ks, cell[0]) for (_, ks), cell in zip(runs, cells, strict=True)])
        for (method, ks), (tflops, ratio) in zip(runs, cells, strict=True):
            value = _halved_tflops(geometry, tokens, ks)
            notes = [other] if other else [_other_layers(geometry, tokens, ks, Fraction(1), tflops, "TFLOPs")]
            notes.append(_other_layers(geometry, tokens, ks, 100 / whole, ratio[:-1], "ratio"))
            setting = ", ".join([f"n = {tokens}", *(f"{k} = {v}" for k, v in _named(ks))])
            note = "; ".join(filter(None, notes))
            share = float(value / whole)
            rows.append(PaperRow(table, model, method, setting, tflops, float(value), ratio, share, note))
    return tuple(rows)


def _named(ks: tuple[int, ...]) -> list[tuple[str, int]]:
    return list(zip(("K",) if len(ks) == 1 else ("K1", "K2"), ks, strict=False))


def _halved_tflops(geometry: Geometry, tokens: int, ks: tuple[int, ...]) -> Fraction:
    """Give Eq. 10's TFLOPs where 50 % of the image tokens go before layer K (K1), 75 % of the rest at K2."""
    drops = tuple(zip(ks, (tokens // 2, tokens // 8), strict=False))
    return Fraction(paper_flops(geometry, make_schedule(geometry.layers, tokens, drops)), 10**12)


def _prints(value: Fraction, printed: str) -> bool:
    """Tell whether a value, cut or rounded to as many decimals as were printed, is the printed one."""
    scale = 10 ** len(printed.partition(".")[2])
    return Fraction(printed) * scale in (value * scale // 1, round(value * scale))


def _other_layers(
    geometry: Geometry, tokens: int, ks: tuple[int, ...], unit: Fraction, printed: str, what: str
) -> str:
    def fits(tried: tuple[int, ...]) -> bool:
        rising = all(a < b for a, b in pairwise(tried))
        return rising and _prints(unit * _halved_tflops(geometry, tokens, tried), printed)

    if fits(ks):
        return ""
    found = []
    for i, (name, _) in enumerate(_named(ks)):
        values = [str(k) for k in range(1, geometry.layers) if fits((*ks[:i], k, *ks[i + 1 :]))]
        found.append(f"{name} = {' or '.join(values)}" if values else f"fits no {name}")
    return f"{what} {printed}: {', '.join(found)}"


def _other_sizes(geometry: Geometry, cells: Sequence[tuple[tuple[int, ...], str]]) -> str:
    found = []
    for m in (geometry.intermediate, 2 * geometry.intermediate):
        sizes = range(8, 1025)
        for ks, printed in cells:
            model = replace(geometry, intermediate=m)
            sizes = [n for n in sizes if _prints(_halved_tflops(model, n, ks), printed)]
        found.append(f"n = {sizes[0]} to {sizes[-1]} at m = {m}" if sizes else f"fits no n at m = {m}")
    return f"TFLOPs {', '.join(printed for _, printed in cells)}: {', or '.join(found)}"
