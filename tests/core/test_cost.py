"""The closed form against FlopCounterMode to the integer, caches to the byte, and hand arithmetic."""

import copy
import itertools
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tiny import DEVICE, FAMILIES, IMAGE, PATCH, RECURRENT, Sample, Tiny, build
from vlmflow.core import cost
from vlmflow.core.cost import Score, cost_of, make_schedule
from vlmflow.core.geometry import GEOMETRIES, Geometry, Tower, geometry_named
from vlmflow.evaluate.published import paper_tables
from vlmflow.models.qwen_vl import QwenVLConfig

LAYERS = 3
HIMAP = ((2, 288), (8, 72))  # LLaVA-1.5-7B: 576 image tokens, then 288, then 72


# -- law 6: FlopCounterMode


class Counted:
    """What FlopCounterMode saw; the rotary tables, a product of no activations, left out."""

    def __init__(self) -> None:
        self.mode = FlopCounterMode(display=False)

    @property
    def flops(self) -> int:
        counts = self.mode.get_flop_counts()
        rotary = [sum(ops.values()) for name, ops in counts.items() if name.endswith(("rotary_emb", "pos_emb"))]
        return self.mode.get_total_flops() - sum(rotary)


@contextmanager
def counting() -> Iterator[Counted]:
    """Count the matrix products inside, attention by the kernel that shows them all."""
    counted = Counted()
    with counted.mode, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        yield counted


def countable(tiny: Tiny) -> hf.PreTrainedModel:
    """The model itself, but experts by plain products: FlopCounterMode has no entry for the grouped one."""
    if not tiny.name.endswith("_moe"):
        return tiny.model
    model = copy.deepcopy(tiny.model)
    model.set_experts_implementation("eager")
    return model


def grids(geometry: Geometry, sample: Sample) -> list[tuple[int, int]]:
    """The patches of each image, tile or frame that a sample brings."""
    assert geometry.vision is not None
    if "image_grid_thw" in sample or "video_grid_thw" in sample:
        rows = [row for key in ("image_grid_thw", "video_grid_thw") for row in sample.get(key, torch.empty(0, 3))]
        return [(int(h), int(w)) for t, h, w in rows for _ in range(int(t))]
    if "spatial_shapes" in sample:
        return [(int(rows), int(columns)) for rows, columns in sample["spatial_shapes"]]
    if geometry.vision.grid is None:
        return [(int(h) // PATCH, int(w) // PATCH) for h, w in sample["image_sizes"]]
    return [geometry.vision.grid] * sample["pixel_values"].shape[:-3].numel()


def held(cache: hf.Cache, dtype_bytes: int) -> tuple[int, ...]:
    """The bytes of keys and values in each layer of a cache; recurrent layers have a state instead."""
    keys = [getattr(layer, "keys", None) for layer in cache.layers]
    return tuple(0 if one is None else 2 * one.numel() * dtype_bytes for one in keys)


def lengths(sample: Sample) -> tuple[int, int]:
    """How many image tokens and how many others."""
    image = int((sample["input_ids"] == IMAGE).sum())
    return image, sample["input_ids"].shape[1] - image


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("family", [*FAMILIES, *RECURRENT])
def test_exact_flops_equal_flop_counter(family: str, index: int) -> None:
    tiny = build(family, layers=LAYERS)
    model, sample = countable(tiny), tiny.samples[index]
    geometry, (image, text) = Geometry.from_config(tiny.model.config), lengths(sample)
    full = make_schedule(LAYERS, image, ())
    with counting() as whole:
        out = model(**sample, use_cache=True)
    price = cost_of(geometry, full, text, logits=image + text, grids=grids(geometry, sample))
    assert whole.flops == price.pruned.exact_flops + price.vision_flops + price.projector_flops
    assert price.vision_flops > 0
    assert price.projector_flops > 0

    for step in (1, 2, 3):  # with a cache, past the window of gemma3_window
        with counting() as one:
            model(torch.tensor([[7]], device=DEVICE), past_key_values=out.past_key_values)
        assert one.flops == cost.decode_flops(geometry, full, text, step=step)
        assert cost.kv_bytes(geometry, full, text, decoded=step, dtype_bytes=4) == held(out.past_key_values, 4)


def test_exact_flops_equal_flop_counter_without_an_image() -> None:
    tiny = build("llava", layers=LAYERS)
    ids = torch.arange(3, 14, device=DEVICE)[None]
    with counting() as counted:
        tiny.model(ids, logits_to_keep=1)
    assert counted.flops == cost.prefill_flops(Geometry.from_config(tiny.model.config), (0,) * LAYERS, 11)


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 130])  # about a convolution's kernel, and the chunks of 64
@pytest.mark.parametrize("family", RECURRENT)
def test_exact_flops_of_recurrent_layers_equal_flop_counter(family: str, tokens: int) -> None:
    tiny = build(family)
    geometry = Geometry.from_config(tiny.model.config)
    assert [geometry.attends(layer) for layer in range(6)] == [False, True] * 3
    with counting() as counted:
        countable(tiny)(torch.arange(tokens, device=DEVICE)[None] % 90 + 3, use_cache=True, logits_to_keep=1)
    assert counted.flops == cost.prefill_flops(geometry, (0,) * 6, tokens)
    assert counted.flops == cost.prefill_flops(geometry, (tokens,) * 6, 0)


def test_exact_flops_of_sparse_and_dense_layers_equal_flop_counter() -> None:
    config = copy.deepcopy(build("qwen3_vl_moe").model.config.text_config)
    config.num_hidden_layers, config.decoder_sparse_step, config.mlp_only_layers = 5, 2, [3]
    model = hf.AutoModel.from_config(config, attn_implementation="sdpa", experts_implementation="eager").to(DEVICE)
    geometry = Geometry.from_config(config)
    assert geometry.dense_layers == (0, 2, 3, 4)
    assert geometry.vision is None
    with counting() as counted:
        model(torch.arange(3, 14, device=DEVICE)[None])
    assert counted.flops == cost.prefill_flops(geometry, (0,) * 5, 11, logits=0)


@pytest.mark.parametrize("family", ["gemma2", "qwen3", "ministral3", "qwen3_moe", "gpt_oss"])
def test_exact_flops_of_other_decoders_equal_flop_counter(family: str) -> None:
    widths = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 2}
    experts = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 24}
    experts = experts if family in ("qwen3_moe", "gpt_oss") else {}
    config = hf.AutoConfig.for_model(family, **widths, **heads, **experts)
    model = hf.AutoModelForCausalLM.from_config(config).to(DEVICE)  # gemma2 and gpt_oss know eager only
    if experts:
        model.set_experts_implementation("eager")
    geometry = Geometry.from_config(config)
    with counting() as counted:
        cache = model(torch.arange(3, 14, device=DEVICE)[None], use_cache=True).past_key_values
    assert counted.flops == cost.prefill_flops(geometry, (0,) * 4, 11, logits=11)
    with counting() as counted:
        model(torch.tensor([[7]], device=DEVICE), past_key_values=cache)
    assert counted.flops == cost.decode_flops(geometry, (0,) * 4, 11)


def test_score_flops_equal_flop_counter() -> None:
    geometry = Geometry(hidden=24, intermediate=8, layers=2, heads=4, kv_heads=2, head_dim=5, vocab=9)
    hidden, q, k = (torch.randn(*shape, device=DEVICE) for shape in ((13, 24), (4, 3, 5), (4, 13, 5)))
    with counting() as counted:
        q @ k.transpose(1, 2)
        for heads in (4, 2, 2):
            torch.nn.functional.linear(hidden, torch.randn(heads * 5, 24, device=DEVICE))
    assert counted.flops == cost.score_flops(geometry, [Score(layer=1, queries=3, keys=13, peek=13)])


def test_built_in_geometries_are_those_of_the_published_configs() -> None:
    clip = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    tower = hf.CLIPVisionConfig(**clip, image_size=336, patch_size=14)
    text = {"vocab_size": 32064, "num_key_value_heads": None}
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    qwen = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
    }
    qwen["num_key_value_heads"] = 4
    vit = {"hidden_size": 1280, "out_hidden_size": 3584}
    llama_7b = hf.LlamaConfig(**text, **dict(zip(sizes, (4096, 11008, 32, 32), strict=True)))
    llama_13b = hf.LlamaConfig(**text, **dict(zip(sizes, (5120, 13824, 40, 40), strict=True)))
    qwen3 = dict(zip(sizes, (4096, 12288, 36, 32), strict=True), num_key_value_heads=8, head_dim=128)
    configs = {
        "llava-1.5-7b": hf.LlavaConfig(vision_config=tower, text_config=llama_7b),
        "llava-1.5-13b": hf.LlavaConfig(vision_config=tower, text_config=llama_13b),
        "qwen2.5-vl-7b": hf.Qwen2_5_VLConfig(text_config={**qwen, "vocab_size": 152064}, vision_config=vit),
        "qwen3-vl-8b": hf.Qwen3VLConfig(text_config=qwen3, vision_config={"out_hidden_size": 4096}),
        "internvl3-8b": hf.InternVLConfig(text_config=hf.Qwen2Config(**qwen, vocab_size=151674)),
    }
    configs["qwen-vl-chat"] = QwenVLConfig(
        text_config=hf.Qwen2Config(**dict(zip(sizes, (4096, 11008, 32, 32), strict=True)), num_key_value_heads=32)
    )
    assert {name: Geometry.from_config(config) for name, config in configs.items()} == GEOMETRIES


# -- the paper's convention


@pytest.mark.parametrize(
    ("model", "drops", "flops"),
    [
        ("llava-1.5-7b", (), 2_986_076_012_544),  # printed 2.98
        ("llava-1.5-7b", HIMAP, 735_307_628_544),  # printed 0.73
        ("llava-1.5-7b", ((2, 288),), 1_565_968_564_224),  # FastV, printed 1.56
        ("llava-1.5-13b", (), 5_813_305_344_000),  # printed 5.81
        ("llava-1.5-13b", ((3, 288), (8, 72)), 1_364_522_434_560),  # printed 1.36
    ],
)
def test_eq_10_gives_table_1(model: str, drops: tuple[tuple[int, int], ...], flops: int) -> None:
    geometry = GEOMETRIES[model]
    assert cost.paper_flops(geometry, make_schedule(geometry.layers, 576, drops)) == flops


def test_eq_10_by_hand() -> None:
    geometry = Geometry(hidden=10, intermediate=7, layers=2, heads=2, kv_heads=1, head_dim=5, vocab=9)
    assert cost.paper_flops(geometry, (3, 1)) == (1200 + 180 + 420) + (400 + 20 + 140)
    moe = replace(geometry, experts=8, experts_per_token=2, expert_intermediate=4, dense_layers=(0,))
    assert cost.paper_flops(moe, (3, 1)) == (1200 + 180 + 420) + (400 + 20 + 160)
    shared = replace(moe, shared_expert=True)
    assert cost.paper_flops(shared, (3, 1)) == (1200 + 180 + 420) + (400 + 20 + 160 + 140)


def test_paper_tables_find_what_prints_each_cell() -> None:
    rows = {(row.table, row.model, row.method): row for row in paper_tables()}
    assert len(rows) == 15
    notes = {key: row.note for key, row in rows.items() if row.note}
    qwen = "TFLOPs 3.6, 1.9, 0.89: n = 694 to 703 at m = 11008, or n = 447 to 453 at m = 22016"
    assert notes == {
        (1, "llava-1.5-7b", "FastV"): "ratio 54: K = 3",
        (1, "llava-1.5-13b", "FastV"): "TFLOPs 3.09: K = 3; ratio 53: K = 3",
        (1, "qwen-vl-chat", "Baseline"): qwen,
        (1, "qwen-vl-chat", "FastV"): qwen,
        (1, "qwen-vl-chat", "HiMAP"): qwen,
        (2, "llava-1.5-7b", "FastV"): "ratio 54: K = 3",
        (2, "llava-1.5-7b", "HiMAP"): "TFLOPs 1.01: fits no K1, K2 = 16; ratio 34: K1 = 3, K2 = 16",
        (2, "llava-1.5-13b", "FastV"): "TFLOPs 3.06: fits no K; ratio 53: K = 3",
        (2, "llava-1.5-13b", "HiMAP"): ("TFLOPs 1.93: fits no K1, fits no K2; ratio 33: K1 = 5 or 6, K2 = 18 or 19"),
    }
    first = rows[1, "llava-1.5-7b", "HiMAP"]
    assert (first.printed_tflops, first.printed_ratio, first.setting) == (
        "0.73",
        "24%",
        "n = 576, K1 = 2, K2 = 8",
    )
    assert (first.tflops, first.ratio) == (pytest.approx(0.735307628544), pytest.approx(0.24624545))
    assert rows[1, "qwen-vl-chat", "Baseline"].tflops == pytest.approx(1.305670057984)


# -- the exact convention by hand


def test_exact_flops_by_hand() -> None:
    geometry = Geometry(hidden=10, intermediate=7, layers=2, heads=2, kv_heads=1, head_dim=5, vocab=9)
    weights = 10 * 10 + 10 * 5 * 2 + 10 * 10 + 3 * 10 * 7  # q, k and v, o, MLP
    full = 2 * 8 * weights + 4 * 10 * 64 + 2 * 6 * weights + 4 * 10 * 36
    assert cost.prefill_flops(geometry, (3, 1), 5) == full + 2 * 10 * 9
    assert cost.prefill_flops(geometry, (3, 1), 5, logits=8) == full + 8 * 2 * 10 * 9
    assert cost_of(geometry, (3, 1), 5).pruned.exact_flops == full + 2 * 10 * 9
    causal = 2 * 8 * weights + 4 * 10 * 36 + 2 * 6 * weights + 4 * 10 * 21
    assert cost.prefill_flops(geometry, (3, 1), 5, attention="causal", logits=0) == causal
    assert cost_of(geometry, (3, 1), 5, attention="causal", logits=0).pruned.exact_flops == causal
    assert cost.decode_flops(geometry, (3, 1), 5, step=2) == 4 * weights + 4 * 10 * (10 + 8) + 2 * 10 * 9
    assert cost.kv_bytes(geometry, (3, 1), 5, decoded=4, dtype_bytes=2) == (12 * 20, 10 * 20)
    plain = replace(geometry, gated=False)
    assert full + 180 - cost.prefill_flops(plain, (3, 1), 5) == 2 * (8 + 6) * 10 * 7
    windows = replace(geometry, windows=(4, None))
    assert cost.kv_bytes(windows, (3, 1), 5, dtype_bytes=1) == (3 * 10, 6 * 10)


@pytest.mark.parametrize("window", [None, 1, 3, 20])
def test_causal_pairs_are_those_of_the_mask(window: int | None) -> None:
    geometry = Geometry(hidden=1, intermediate=0, layers=1, heads=1, kv_heads=0, head_dim=1, vocab=0, windows=(window,))
    for tokens in range(1, 9):
        seen = sum(1 for i in range(tokens) for j in range(i + 1) if window is None or i - j < window)
        got = cost.prefill_flops(geometry, (0,), tokens, attention="causal")
        assert got == 2 * tokens * 2 + 4 * seen  # q and o projections, then the pairs


def test_causal_decoding_pairs_are_those_of_the_cache() -> None:
    geometry = Geometry(hidden=4, intermediate=4, layers=1, heads=2, kv_heads=2, head_dim=2, vocab=3)
    for window, step in itertools.product((None, 4, 30), (1, 5)):
        g = replace(geometry, windows=(window,))
        grown = cost.prefill_flops(g, (2,), 3 + step, attention="causal")
        before = cost.prefill_flops(g, (2,), 2 + step, attention="causal", logits=0)
        assert cost.decode_flops(g, (2,), 3, step=step) == grown - before


def test_vision_windows_cover_ragged_edges() -> None:
    tower = Tower(2, 0, 3, 0, 4, 1, window=4, full_layers=(1,))
    pairs = 36**2 + 2 * (16**2 + 8**2 + 8**2 + 4**2)  # one layer sees all of 6 x 6, two see four windows
    assert cost.vision_flops(tower, [(6, 6)]) == 2 * 3 * 36 * 16 + 8 * pairs
    assert cost.projector_flops(tower, [(6, 6), (2, 2)]) == 2 * 10


# -- schedules and the result


def test_make_schedule_counts_from_layers() -> None:
    schedule = make_schedule(32, 576, HIMAP)
    assert schedule == (576,) * 2 + (288,) * 6 + (72,) * 24
    assert sum(schedule) / 32 == 144
    assert make_schedule(4, 9, ()) == (9, 9, 9, 9)
    assert make_schedule(4, 9, ((0, 5), (3, 0))) == (5, 5, 5, 0)


def test_pruning_never_costs_more_and_keeping_all_costs_the_same() -> None:
    rng, geometries = (
        random.Random(0),
        [GEOMETRIES["qwen3-vl-8b"], Geometry.from_config(gemma().model.config)],
    )
    for geometry, _ in itertools.product(geometries, range(30)):
        counts = tuple(sorted((rng.randrange(700) for _ in range(geometry.layers)), reverse=True))
        attention = rng.choice(["full", "causal"])
        pruned = cost_of(geometry, counts, rng.randrange(90), attention=attention)
        for whole, part, share in pruned.table().values():
            assert part <= whole
            assert share == (part / whole if whole else 1.0)
        kept = cost_of(geometry, counts[:1] * geometry.layers, 5, attention=attention)
        assert kept.pruned == kept.unpruned


def gemma() -> Tiny:
    return build("gemma3_window", layers=LAYERS)


def test_cost_of_himap_on_llava() -> None:
    geometry = GEOMETRIES["llava-1.5-7b"]
    scores = (Score(layer=1, queries=25, keys=636), Score(layer=7, queries=288, keys=348))
    price = cost_of(geometry, make_schedule(32, 576, HIMAP), 60, scores=scores, grids=[(24, 24)])
    assert price.pruned.score_flops == 2 * 4096 * (25 * 636 + 288 * 348)
    assert price.unpruned.score_flops == 0
    assert price.table()["mean_image_tokens"] == (576, 144, 0.25)
    assert price.share("paper_flops") == pytest.approx(0.24624545)
    assert 1 / price.share("exact_flops") == pytest.approx(3.158, abs=1e-3)
    assert price.share("kv_bytes") == pytest.approx((60 + 144) / 636)
    assert sum(price.unpruned.kv_bytes) == 636 * 32 * 2 * 4096 * 2
    assert (price.vision_flops, price.projector_flops) == (
        cost.vision_flops(geometry.vision, [(24, 24)]),
        2 * 576 * (1024 * 4096 + 4096**2),
    )
    assert "exact_flops" in str(price)
    assert "31.7%" in str(price)
    record = json.loads(json.dumps(price.to_dict()))
    assert record["shares"]["mean_image_tokens"] == 0.25
    assert record["pruned"]["kv_bytes"] == list(price.pruned.kv_bytes)


def test_costs_add_over_samples() -> None:
    geometry = GEOMETRIES["llava-1.5-7b"]
    a = cost_of(geometry, make_schedule(32, 576, HIMAP), 60, grids=[(24, 24)])
    b = cost_of(geometry, (0,) * 32, 10, grids=[(24, 12)])
    both = a + b
    assert both.vision_flops == a.vision_flops + b.vision_flops > a.vision_flops
    assert both.projector_flops == a.projector_flops + b.projector_flops > a.projector_flops
    assert both.samples == 2
    assert both.table()["mean_image_tokens"] == (288, 72, 0.25)
    assert both.pruned.exact_flops == a.pruned.exact_flops + b.pruned.exact_flops
    assert both.pruned.kv_bytes[5] == a.pruned.kv_bytes[5] + b.pruned.kv_bytes[5]
    assert b.share("paper_flops") == 1.0
    with pytest.raises(ValueError, match="add costs of one model and convention"):
        a + cost_of(geometry, (0,) * 32, 10, attention="causal")


def test_pruning_before_the_decoder_is_priced_against_all_image_tokens() -> None:
    geometry = GEOMETRIES["llava-1.5-7b"]
    price = cost_of(geometry, (64,) * 32, 60, image_tokens=576)
    assert price.vision_flops == price.projector_flops == cost_of(G2, (3, 1), 1).projector_flops == 0
    assert price.table()["mean_image_tokens"] == (576, 64, 1 / 9)


# -- errors


G2 = Geometry(hidden=10, intermediate=7, layers=2, heads=2, kv_heads=1, head_dim=5, vocab=9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: cost.paper_flops(G2, (3, 2, 1)),
            r"decoder layer, got 3; make_schedule\(layers, image_tokens, drops\) builds one$",
        ),
        (lambda: cost.prefill_flops(G2, (3, -1), 4), "wanted counts of at least 0, got -1"),
        (lambda: cost.kv_bytes(G2, (3, 1), -4), "wanted counts of at least 0, got -4"),
        (
            lambda: cost_of(G2, (3, 4), 1),
            "wanted at most 3 image tokens in layer 1, got 4; a schedule never rises: dropped",
        ),
        (lambda: cost.decode_flops(G2, (3, 3), 1, step=0), "wanted a step of at least 1, got 0"),
        (lambda: cost.kv_bytes(G2, (3, 3), 1, dtype_bytes=0), "^kv_bytes: wanted decoded >= 0 and .* got 0 and 0; bf"),
        (lambda: cost_of(G2, (3, 3), 1, image_tokens=2), "wanted image_tokens of at least 3, got 2"),
        (lambda: cost_of(G2, (3, 3), 1, grids=[(2, 2)]), "wanted a geometry with a vision tower"),
        (lambda: cost_of(G2, (3, 1), 1, scores=[Score(2, 1, 1)]), "wanted a layer in 0 to 1, got Score"),
        (
            lambda: cost_of(G2, (3, 1), 1, scores=[Score(1, 1, 3)]),
            "0 to 2 tokens, .*; count one sample's own tokens, padding left out",
        ),
        (lambda: cost_of(G2, (3, 1), 1, scores=[Score(1, 1, 5, peek=4)]), "wanted 0 to 4 tokens"),
        (
            lambda: make_schedule(4, 9, ((2, 5), (1, 3))),
            "rise from one drop to the next and stay below 4, got 1 after 2; order the drops by layer",
        ),
        (lambda: make_schedule(4, 9, ((4, 5),)), "stay below 4, got 4 after -1"),
        (
            lambda: make_schedule(4, 9, ((1, 5), (2, 6))),
            "to keep before layer 2, got 6; keep is a count that stays, not a share",
        ),
        (
            lambda: geometry_named("llava-7b"),
            r"one of llava-1.5-7b, .*, got 'llava-7b'; use Geometry.from_config\(config\) for other",
        ),
    ],
)
def test_errors_say_what_was_wanted(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_peek_may_see_what_its_layer_will_not() -> None:
    price = cost_of(G2, (3, 1), 1, scores=[Score(layer=1, queries=1, keys=4, peek=4)])
    assert price.pruned.score_flops == 2 * 10 * 4 + 2 * 4 * 10 * 20


def test_from_config_names_what_is_missing() -> None:
    config = hf.GPT2Config()
    with pytest.raises(ValueError, match=r"among llama, mistral, .*, got 'gpt2' in GPT2Config; give Geometry"):
        Geometry.from_config(config)
    text = SimpleNamespace(model_type="llama", hidden_size=8)
    with pytest.raises(ValueError, match="the attribute 'intermediate_size', got a SimpleNamespace without it"):
        Geometry.from_config(text)
    config = copy.deepcopy(build("llava", layers=LAYERS).model.config)
    config.vision_config = hf.ViTConfig()
    with pytest.raises(ValueError, match=r"among clip_vision_model, .*, got 'vit' in ViTConfig"):
        Geometry.from_config(config)
    config = hf.VipLlavaConfig()
    with pytest.raises(ValueError, match=r"among llava, .*, got 'vipllava' in VipLlavaConfig"):
        Geometry.from_config(config)
    config = hf.Qwen2Config(num_hidden_layers=2, layer_types=["full_attention", "full_attention"])
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match=r"got \['linear_attention'\]; other kinds of layer are not modelled"):
        Geometry.from_config(config)


def test_windows_follow_layer_types_or_hold_everywhere() -> None:
    kinds = Geometry.from_config(gemma().model.config).windows
    assert kinds == (14, None, 14)
    mistral = hf.MistralConfig(num_hidden_layers=2, sliding_window=7)
    assert Geometry.from_config(mistral).windows == (7, 7)
    assert Geometry.from_config(hf.MistralConfig(num_hidden_layers=2, sliding_window=None)).windows == ()
