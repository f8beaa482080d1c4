"""The widths that decide what a model costs: read from any supported model's config, or built in by name; no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vlmflow.core.errors import refusal

DECODERS = (  # text model_types whose layers are q, k, v and o projections and a gated MLP, routed or not
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text qwen2_vl_text qwen2_5_vl_text qwen3_vl_text "
    "qwen3_vl_moe_text glm4v_text"
)
TILED = "llava llava_next llava_onevision internvl idefics3 smolvlm mistral3 gemma3 paligemma"
DYNAMIC = "qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe glm4v"
CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0, "pixtral": 0}


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

    @property
    def image_tokens(self) -> int | None:
        """Image tokens of one tile, None where the image's size decides."""
        return None if self.grid is None else self.grid[0] * self.grid[1] // self.merge


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
            raise refusal(
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
    return refusal(
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
        raise refusal("Geometry.from_config", known, sorted(other), "other kinds of layer are not modelled")
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
        raise refusal("geometry_named", known, repr(name), "use Geometry.from_config(config) for other models")
    return GEOMETRIES[name]
