"""The widths of text decoders and vision towers as configs name them: a reader for each way of naming; no torch.

A decoder's reader makes a ``Geometry`` of a text config; a tower's makes a ``Tower``, with its projector, of a whole
config and the text decoder's width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from vlmflow.core.errors import refusal
from vlmflow.core.geometry import Geometry, Recurrence, Tower, multiply_adds, resampled

LAYER_KINDS = ("full_attention", "sliding_attention")  # of attention, whose cost is known


class Config:
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

    def of_unknown_type(self, known: Iterable[str]) -> ValueError:
        """The error that this config's ``model_type`` is not a known one."""
        return refusal(
            "Geometry.from_config",
            f"a model_type among {', '.join(known)}",
            f"{self.model_type!r} in {type(self.config).__name__}",
            "give Geometry(...) the widths by hand",
        )


# -- text decoders


def dense_decoder(text: Config) -> Geometry:
    """Layers of q, k, v and o projections and a gated MLP."""
    return _decoder(text, text.intermediate_size)


def _decoder(text: Config, intermediate: int, *others: str) -> Geometry:
    """The same with an MLP of that width; layers attend in a known way, or are of one of the ``others``' kinds."""
    return Geometry(
        hidden=text.hidden_size,
        intermediate=intermediate,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads or text.num_attention_heads,
        head_dim=text.optional("head_dim") or text.hidden_size // text.num_attention_heads,
        vocab=text.vocab_size,
        windows=_windows(text, (*LAYER_KINDS, *others)),
    )


def routed_decoder(text: Config) -> Geometry:
    """The same, but some layers route each token to a few of many gated MLPs."""
    dense, step = text.mlp_only_layers or (), text.decoder_sparse_step
    return replace(
        dense_decoder(text),
        experts=text.num_experts,
        experts_per_token=text.num_experts_per_tok,
        expert_intermediate=text.moe_intermediate_size,
        dense_layers=tuple(i for i in range(text.num_hidden_layers) if i in dense or (i + 1) % step),
    )


def gpt_oss_decoder(text: Config) -> Geometry:
    """gpt-oss's: every layer routes each token to a few of many gated MLPs."""
    return replace(
        dense_decoder(text),
        experts=text.num_local_experts,
        experts_per_token=text.num_experts_per_tok,
        expert_intermediate=text.intermediate_size,
    )


def qwen3_5_decoder(text: Config) -> Geometry:
    """Gated attention in some layers, the gated delta rule in the others."""
    return _gated_decoder(text, text.intermediate_size)


def qwen3_5_moe_decoder(text: Config) -> Geometry:
    """The same, but all layers route each token to a few of many gated MLPs, and through one that all share."""
    return replace(
        _gated_decoder(text, text.shared_expert_intermediate_size),
        experts=text.num_experts,
        experts_per_token=text.num_experts_per_tok,
        expert_intermediate=text.moe_intermediate_size,
        shared_expert=True,
    )


def _gated_decoder(text: Config, intermediate: int) -> Geometry:
    keys = text.linear_num_key_heads * text.linear_key_head_dim
    values = text.linear_num_value_heads * text.linear_value_head_dim
    inwards = 2 * keys + 2 * values + 2 * text.linear_num_value_heads  # q and k, v and z, b and a
    recurrence = Recurrence(
        layers=_layers_of(text, "linear_attention"),
        projections=text.hidden_size * (inwards + values),
        channels=2 * keys + values,
        kernel=text.linear_conv_kernel_dim,
        heads=text.linear_num_value_heads,
        key_dim=text.linear_key_head_dim,
        value_dim=text.linear_value_head_dim,
    )
    return replace(_decoder(text, intermediate, "linear_attention"), gated_attention=True, recurrence=recurrence)


def lfm2_decoder(text: Config) -> Geometry:
    """Attention in some layers, short convolutions in the others; the MLP's width is rounded up from two thirds."""
    width = text.intermediate_size
    if text.block_auto_adjust_ff_dim:
        width, multiple = int(2 * width / 3), text.block_multiple_of
        if (scale := text.block_ffn_dim_multiplier) is not None:
            width = -(-int(scale * width) // multiple) * multiple
    recurrence = Recurrence(
        layers=_layers_of(text, "conv"),
        projections=4 * text.hidden_size**2,
        channels=text.hidden_size,
        kernel=text.conv_L_cache,
    )
    return replace(_decoder(text, width, "conv"), recurrence=recurrence)


def _layers_of(text: Config, kind: str) -> tuple[int, ...]:
    return tuple(layer for layer, one in enumerate(text.layer_types) if one == kind)


def _windows(text: Config, known: Sequence[str]) -> tuple[int | None, ...]:
    """List each layer's window by the rule of transformers' caches: layer_types, else one for all layers."""
    kinds = text.optional("layer_types")
    if kinds is None:
        windows = (text.optional("sliding_window"),) * text.num_hidden_layers
    elif other := {*kinds} - {*known}:
        wanted = f"layer_types among {', '.join(known)}"
        raise refusal("Geometry.from_config", wanted, sorted(other), "other kinds of layer are not modelled")
    else:
        windows = tuple(text.sliding_window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()


# -- vision towers that see a picture in tiles of a fixed size


def llava_tower(config: Config, width: int) -> Tower:
    """Any shared tower, and a projector of two layers on the features of one depth, or of several side by side."""
    tower = _shared(config)
    return replace(tower, projector=multiply_adds(tower.hidden * _depths(config), width, width))


def mistral3_tower(config: Config, width: int) -> Tower:
    """As LLaVA's, behind a layer that merges patches."""
    tower = replace(llava_tower(config, width), merge=config.spatial_merge_size**2)
    return replace(tower, projector=tower.projector + multiply_adds(tower.merge * tower.hidden, tower.hidden))


def internvl_tower(config: Config, width: int) -> Tower:
    """Its own tower with a class token, and a projector of two layers on merged patches."""
    tower, merge = _vit(Config(config.vision_config)), int(1 / config.downsample_ratio) ** 2
    projector = multiply_adds(merge * tower.hidden, width, width)
    return replace(tower, merge=merge, projector=projector, class_tokens=1)


def idefics3_tower(config: Config, width: int) -> Tower:
    """Its own tower, and a projector of one layer on merged patches."""
    tower, merge = _vit(Config(config.vision_config)), config.scale_factor**2
    return replace(tower, merge=merge, projector=multiply_adds(merge * tower.hidden, width))


def gemma3_tower(config: Config, width: int) -> Tower:
    """Any shared tower, whose patches are averaged to a given number of image tokens before one layer."""
    tower = _shared(config)
    merge = (tower.image_tokens or 0) // config.mm_tokens_per_image
    return replace(tower, merge=merge, projector=multiply_adds(tower.hidden, width))


def paligemma_tower(config: Config, width: int) -> Tower:
    """Any shared tower, and a projector of one layer."""
    tower = _shared(config)
    return replace(tower, projector=multiply_adds(tower.hidden, config.vision_config.projection_dim))


def qwen_vl_tower(config: Config, width: int) -> Tower:
    """Qwen-VL's own tower; its resampler attends once from learned queries to all patches, and is its projector."""
    vision = Config(config.vision_config)
    return resampled(_vit(vision), vision.num_queries, vision.output_dim)


def _vit(vision: Config) -> Tower:
    """A tower that names its widths as CLIP does, without class token or projector."""
    (height, breadth), (rows, columns) = _pair(vision.patch_size), _pair(vision.image_size)
    return Tower(
        hidden=vision.hidden_size,
        intermediate=vision.intermediate_size,
        layers=vision.num_hidden_layers,
        patch_inputs=vision.num_channels * height * breadth,
        merge=1,
        projector=0,
        grid=(rows // height, columns // breadth),
    )


def _clip(vision: Config) -> Tower:
    return replace(_vit(vision), class_tokens=1)


def _pixtral(vision: Config) -> Tower:
    return replace(_vit(vision), gated=True, grid=None)


_SHARED = {"clip_vision_model": _clip, "siglip_vision_model": _vit, "pixtral": _pixtral}


def _shared(config: Config) -> Tower:
    """One of the towers that several families carry, by its own model_type."""
    vision = Config(config.vision_config)
    if vision.model_type not in _SHARED:
        raise vision.of_unknown_type(_SHARED)
    return _SHARED[vision.model_type](vision)


def _depths(config: Config) -> int:
    layers = config.vision_feature_layer
    return 1 if isinstance(layers, int) else len(layers)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


# -- vision towers that see a picture whole, at its own size


def qwen2_vl_tower(config: Config, width: int) -> Tower:
    """Qwen2-VL's, where hidden_size names the output."""
    vision = Config(config.vision_config)
    return _sized(vision, vision.embed_dim, int(vision.embed_dim * vision.mlp_ratio), vision.hidden_size)


def qwen2_5_vl_tower(config: Config, width: int) -> Tower:
    """Qwen2.5-VL's: most layers attend inside windows."""
    vision = Config(config.vision_config)
    side, (height, _) = vision.spatial_merge_size, _pair(vision.patch_size)
    return replace(
        _sized(vision, vision.hidden_size, vision.intermediate_size, vision.out_hidden_size),
        gated=True,
        window=vision.window_size // side // height * side,
        full_layers=tuple(vision.fullatt_block_indexes),
    )


def qwen3_vl_tower(config: Config, width: int) -> Tower:
    """Qwen3-VL's: the features of several depths are projected, by a merger each."""
    tower = qwen3_5_tower(config, width)
    return replace(tower, projector=tower.projector * (1 + len(config.vision_config.deepstack_visual_indexes)))


def qwen3_5_tower(config: Config, width: int) -> Tower:
    """Qwen3.5's: the features of one depth are projected."""
    vision = Config(config.vision_config)
    return _sized(vision, vision.hidden_size, vision.intermediate_size, vision.out_hidden_size)


def lfm2_vl_tower(config: Config, width: int) -> Tower:
    """A SigLIP 2 tower, and a projector of two layers on merged patches."""
    vision, merge = Config(config.vision_config), config.downsample_factor**2
    return Tower(
        hidden=vision.hidden_size,
        intermediate=vision.intermediate_size,
        layers=vision.num_hidden_layers,
        patch_inputs=vision.num_channels * vision.patch_size**2,
        merge=merge,
        projector=multiply_adds(merge * vision.hidden_size, config.projector_hidden_size, width),
    )


def glm4v_tower(config: Config, width: int) -> Tower:
    """GLM-4V's: its MLPs are as wide as the output, and intermediate_size belongs to the merger's gated MLP."""
    vision = Config(config.vision_config)
    out = vision.out_hidden_size
    tower = _sized(vision, vision.hidden_size, out, out)
    merger = multiply_adds(tower.merge * tower.hidden, out, out) + 3 * out * vision.intermediate_size
    return replace(tower, gated=True, projector=merger)


def _sized(vision: Config, hidden: int, intermediate: int, out: int) -> Tower:
    """A tower that names its other widths as Qwen's do, with a merger of two layers."""
    (height, breadth), merge = _pair(vision.patch_size), vision.spatial_merge_size**2
    return Tower(
        hidden=hidden,
        intermediate=intermediate,
        layers=vision.depth,
        patch_inputs=vision.in_channels * vision.temporal_patch_size * height * breadth,
        merge=merge,
        projector=multiply_adds(merge * hidden, merge * hidden, out),
    )
