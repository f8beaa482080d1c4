"""The protocol of time: what is run, in which order, and what is counted. Nothing here depends on the clock."""

import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import oracles
from vlmflow import VTW, FastV, HiMAP, attach
from vlmflow.core.cost import kv_bytes
from vlmflow.core.geometry import Geometry
from vlmflow.core.statistics import Interval
from vlmflow.pruners import Unpruned
from vlmflow.records.schema import BenchPoint, LatencyRecord
from vlmflow.speed import latency
from vlmflow.speed.latency import (
    Request,
    Timing,
    compare,
    peak_memory,
    ratio_of_medians,
    run,
    summed_up,
    warm_up,
)
from vlmflow.speed.synthetic import random_model, random_prompt, square_side

GEOMETRY = Geometry(hidden=64, intermediate=96, layers=6, heads=4, kv_heads=2, head_dim=16, vocab=300)


@pytest.fixture(scope="module")
def model():
    return random_model(GEOMETRY, side=5, share_weights=True)


@pytest.fixture(scope="module")
def prompts(model):
    return random_prompt(model, image_tokens=50, text_tokens=7, batch=3)


def test_side_of_the_largest_square():
    assert square_side(576) == 24
    assert square_side(576, 1152, 2880) == 24
    assert square_side(300) == 10
    assert square_side(7) == 1


def test_random_model_has_the_geometry(model):
    read = Geometry.from_config(model.config)
    assert (read.hidden, read.intermediate, read.layers, read.heads, read.kv_heads, read.head_dim, read.vocab) == (
        64, 96, 6, 4, 2, 16, 300,
    )  # fmt: skip
    assert [layer.self_attn.layer_idx for layer in model.model.language_model.layers] == list(range(6))


def test_shared_weights_are_one_set_and_compute_the_same(model, prompts):
    layers = model.model.language_model.layers
    assert len({weight.data_ptr() for layer in layers for weight in layer.parameters()}) == len(
        list(layers[0].parameters())
    )
    apart = random_model(GEOMETRY, side=5)
    pointers = {weight.data_ptr() for layer in apart.model.language_model.layers for weight in layer.parameters()}
    assert len(pointers) == 6 * len(list(layers[0].parameters()))
    assert torch.equal(model(**prompts).logits, apart(**prompts).logits)


def test_a_random_decoder_is_a_stock_llama(model):
    """The same weights in a model that transformers made whole give the same hidden states."""
    stock = LlamaForCausalLM(model.config.text_config).eval()
    weights = {f"model.{name}": weight for name, weight in model.model.language_model.state_dict().items()}
    stock.load_state_dict(weights | {"lm_head.weight": model.lm_head.weight})
    ids = torch.arange(10, 30)[None]
    assert torch.equal(stock(ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("pruner", [Unpruned(), HiMAP(k1=1, k2=3), VTW(k=3)], ids=repr)
def test_a_run_counts_tokens_and_bytes(model, prompts, pruner):
    """The cache holds, to the byte, what the cost model says for the prompt and all but the last new token."""
    timing = run(model, Request(prompts, new_tokens=5), pruner)
    assert len(timing.decode) == 4
    assert min(timing.vision, timing.decoder, timing.head, *timing.decode) > 0
    assert timing.parts["prefill"] == timing.decoder + timing.head
    assert timing.parts["ttft"] == timing.vision + timing.parts["prefill"]
    assert timing.parts["total"] == pytest.approx(timing.parts["ttft"] + sum(timing.decode))
    schedule = pruner.schedule(6, 50)
    assert timing.kv_bytes == 3 * sum(kv_bytes(GEOMETRY, schedule, 7, decoded=4, dtype_bytes=4))


def test_the_decoders_time_ends_before_lm_head(model, prompts, monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr("vlmflow.speed.latency.time.perf_counter", lambda: float(next(ticks)))
    hook = model.lm_head.register_forward_pre_hook(lambda *_: [next(ticks) for _ in range(5)] and None)
    timing = run(model, Request(prompts), Unpruned())
    hook.remove()
    assert (timing.vision, timing.decoder, timing.head) == (1, 1, 6)


def test_the_papers_protocol_reads_the_whole_text_each_time(model, prompts):
    eager = random_model(GEOMETRY, side=5, share_weights=True, attn="eager")
    lengths = []
    hook = eager.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append((args[0].shape[1], kwargs.get("past_key_values"))), with_kwargs=True
    )
    timing = run(eager, Request(prompts, 3, "paper"), FastV(k=2))
    hook.remove()
    assert lengths == [(57, None), (58, None), (59, None)]
    assert timing.kv_bytes == 0
    assert len(timing.decode) == 2


def test_unpruned_runs_with_nothing_attached(model, prompts):
    with attach(model, FastV()):
        run(model, Request(prompts), Unpruned())
        with pytest.raises(ValueError, match="already"):
            run(model, Request(prompts), HiMAP(k1=1, k2=3))


def test_runs_are_interleaved_after_a_round_that_is_not_counted(model, prompts, monkeypatch):
    seen = []

    def fake(_model, _request, pruner):
        seen.append(type(pruner).__name__)
        return Timing(1.0, float(len(seen)), 0.0, (), None, 0)

    def warm(*given):
        seen.append("warm")
        return warm_up(*given)

    monkeypatch.setattr("vlmflow.speed.latency.run", fake)
    monkeypatch.setattr("vlmflow.speed.latency.warm_up", warm)
    found = compare(model, Request(prompts), {"himap": HiMAP(k1=1, k2=3), "vtw": VTW(k=3)}, repeats=2)
    assert seen == ["warm"] * 3 + ["Unpruned", "HiMAP", "VTW"] * 2
    assert found.methods["none"].seconds["prefill"] == (4 + 7) / 2
    assert found.methods["vtw"].seconds["prefill"] == (6 + 9) / 2
    assert found.methods["himap"].speedup["prefill"].value == (4 + 7) / (5 + 8)
    assert found.image_tokens == [50, 50, 50]
    assert found.text_tokens == [7, 7, 7]
    cost = HiMAP(k1=1, k2=3).cost(GEOMETRY, 50, 7, 7)
    assert found.methods["himap"].promised == pytest.approx(1 / cost.share("exact_flops"))


@pytest.mark.parametrize("protocol", ["deployed", "paper"])
def test_warming_up_decodes_and_tells_of_the_prompts(model, prompts, protocol):
    lengths = []
    layer = model.model.language_model.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    trace = warm_up(model, Request(prompts, 3, protocol), HiMAP(k1=1, k2=3))
    hook.remove()
    assert lengths == [57, 1, 1]
    assert trace.tokens[0] == (57, 57, 57)
    assert trace.image_tokens[3] == (6, 6, 6)


# -- what is made of the seconds

PLAIN = [  # five rounds of the bare model: vision, decoder, head, decode; one odd one, as a busy machine gives
    (1.0, 8.0, 0.5, (0.5, 0.25, 2.0)),
    (2.0, 9.0, 0.25, (0.5, 0.5, 0.5)),
    (1.5, 70.0, 0.5, (9.0, 0.5, 0.75)),
    (1.0, 8.5, 0.75, (0.25, 0.5, 0.5)),
    (1.25, 8.25, 0.5, (0.5, 0.5, 1.0)),
]
PRUNED = [
    (1.0, 4.0, 0.5, (0.25, 0.25, 3.0)),
    (2.5, 5.0, 0.25, (0.5, 0.25, 0.25)),
    (1.5, 4.5, 0.5, (0.25, 7.0, 0.5)),
    (1.0, 60.0, 0.5, (0.5, 0.25, 0.25)),
    (1.25, 4.25, 1.0, (0.25, 0.25, 0.5)),
]


def timings(rounds, peaks=(None,) * 5) -> list[Timing]:
    return [Timing(*parts, peak, 77) for parts, peak in zip(rounds, peaks, strict=True)]


def plain_parts(vision, decoder, head, decode) -> dict[str, float]:
    first = vision + decoder + head
    return {
        "vision": vision,
        "decoder": decoder,
        "prefill": decoder + head,
        "ttft": first,
        "tpot": oracles.median(decode),
        "total": first + sum(decode),
    }


def test_the_parts_of_a_run():
    assert Timing(1.0, 8.0, 0.5, (0.5, 0.25, 2.0), None, 0).parts == {
        "vision": 1.0, "decoder": 8.0, "prefill": 8.5, "ttft": 9.5, "tpot": 0.5, "total": 12.25,
    }  # fmt: skip
    assert "tpot" not in Timing(1.0, 8.0, 0.5, (), None, 0).parts


def test_seconds_and_speedups_against_a_plain_loop():
    """Medians over rounds; a speed-up is the ratio of two of them, of the same rounds in each resample."""
    record = summed_up(FastV(k=3), 1.75, timings(PLAIN), timings(PRUNED, (None, 5, 9, 7, None)))
    bare, pruned = [plain_parts(*one) for one in PLAIN], [plain_parts(*one) for one in PRUNED]
    assert record.seconds.keys() == record.speedup.keys() == pruned[0].keys()
    for part, ratio in record.speedup.items():
        pairs = [(one[part], other[part]) for one, other in zip(bare, pruned, strict=True)]
        over, under = zip(*pairs, strict=True)
        assert record.seconds[part] == oracles.median(under)
        resampled = []
        for drawn in oracles.resamples(pairs, range(5), seed=0):
            over_drawn, under_drawn = zip(*drawn, strict=True)
            resampled.append(oracles.median(over_drawn) / oracles.median(under_drawn))
        low, high, _ = oracles.middle_95(resampled)
        found = (ratio.value, ratio.low, ratio.high, ratio.undefined)
        assert found == pytest.approx((oracles.median(over) / oracles.median(under), low, high, 0.0)), part
    assert (record.pruner["name"], record.pruner["k"], record.promised) == ("fastv", 3, 1.75)
    assert (record.peak_bytes, record.kv_bytes) == (9, 77)
    assert summed_up(FastV(), None, timings(PLAIN), timings(PRUNED)).peak_bytes is None


def test_what_does_not_pay_is_judged_by_the_interval_of_the_whole_run():
    """Whatever the value: no run shows a method to be faster whose interval reaches down to 1."""

    def record(total: Interval) -> LatencyRecord:
        parts = {"ttft": Interval(0.5, 0.4, 0.6), "total": total}
        return LatencyRecord({}, dict.fromkeys(parts, 1.0), parts, None, None, 0)

    totals = {
        "none": Interval(1.0, 1.0, 1.0),
        "surely": Interval(1.2, 1.01, 1.4),
        "perhaps": Interval(1.3, 0.99, 1.6),
        "just": Interval(1.1, 1.0, 1.2),
        "slower": Interval(0.8, 0.7, 0.9),
    }
    point = BenchPoint(1, 1, [9], [1], {name: record(total) for name, total in totals.items()})
    assert point.not_paying == {name: totals[name] for name in ("perhaps", "just", "slower")}


def test_peak_memory_is_what_a_block_holds_above_what_was_held_before():
    """Beside what is held before, and more that was held once; Linux counts in lots of pages."""
    mebibyte = 2**20
    held = torch.ones(50 * mebibyte // 4)
    once = torch.ones(100 * mebibyte // 4)
    del once
    with peak_memory(torch.device("cpu")) as peak:
        block = torch.ones(40 * mebibyte // 4)
    assert peak() == pytest.approx(40 * mebibyte, abs=4 * mebibyte)
    assert len(held) > len(block)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    assert latency._resident("VmRSS") == pytest.approx(resident, rel=0.01)


def test_as_many_tokens_as_asked_though_every_word_would_end_the_answer(model, prompts, monkeypatch):
    monkeypatch.setattr(model.generation_config, "eos_token_id", list(range(1, GEOMETRY.vocab)))
    assert len(run(model, Request(prompts, new_tokens=4), Unpruned()).decode) == 3


def test_ratio_and_what_does_not_pay():
    assert ratio_of_medians([2.0, 2.0, 2.0], [1.0, 1.0, 1.0]) == Interval(2.0, 2.0, 2.0)
    noisy = ratio_of_medians([1.0, 3.0, 2.0], [2.0, 1.0, 3.0])
    assert noisy.low < 1 < noisy.high
    base = [Timing(1.0, 1.5, 0.5, (), None, 0)] * 3
    slow = [Timing(1.0, 2.5, 0.5, (), None, 0)] * 3
    rows = {
        "none": summed_up(Unpruned(), 1.0, base, base),
        "fastv": summed_up(FastV(), 2.0, base, slow),
        "himap": summed_up(HiMAP(), 2.0, slow, base),
    }
    assert BenchPoint(1, 1, [9], [1], rows).not_paying.keys() == {"fastv"}
