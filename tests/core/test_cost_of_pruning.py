"""Laws 6 and 8 for pruned runs: the trace prices a prefill to the integer and its cache to the byte."""

import pytest
from test_cost import countable, counting, grids, held

import tiny
from vlmflow import VTW, FastV, HiMAP, PyramidDrop, Random, Uniform, Unpruned, prune
from vlmflow.core.cost import decode_flops, projector_flops, vision_flops
from vlmflow.core.geometry import Geometry

ALTERNATE = [
    *(HiMAP(2, 0.5, 4, 0.75), FastV(4, 0.6), PyramidDrop((1, 3, 5)), VTW(3), Random(1), Uniform(2), Unpruned()),
    *(
        HiMAP(3, 0.5, 5, 0.5),
        PyramidDrop((2, 4)),
    ),  # which score recurrent layers, where the attention before them ranks
]
PRUNERS = [HiMAP(1, 0.5, 2, 0.5), FastV(2, 0.6), PyramidDrop((1, 2)), VTW(2), Random(1), Uniform(2), Unpruned()]


@pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_pruned_prefill_costs_what_the_trace_says(family, pruner):
    small = tiny.build(family, layers=3)
    model, geometry = countable(small), Geometry.from_config(small.model.config)
    assert geometry.vision is not None
    for sample in (small.samples[0], small.samples[2]):
        with prune(model, pruner) as trace, counting() as counted:
            cache = model(**sample, use_cache=True, logits_to_keep=1).past_key_values
        images = grids(geometry, sample)
        outside = vision_flops(geometry.vision, images) + projector_flops(geometry.vision, images)
        price = trace.cost()
        assert counted.flops == price.pruned.exact_flops + outside
        assert price.pruned.kv_bytes == held(cache, dtype_bytes=2)
        assert (price.share("exact_flops") < 1) == (pruner != Unpruned())


@pytest.mark.parametrize("pruner", ALTERNATE, ids=repr)
@pytest.mark.parametrize("family", tiny.RECURRENT)
def test_a_pruned_prefill_with_recurrent_layers_costs_what_the_trace_says(family, pruner):
    small = tiny.build(family)
    model, geometry = countable(small), Geometry.from_config(small.model.config)
    assert geometry.vision is not None
    for sample in (small.samples[0], small.sample([3, (64, 64), 9])):  # one chunk of 64 tokens, and two
        with prune(model, pruner) as trace, counting() as counted:
            cache = model(**sample, use_cache=True, logits_to_keep=1).past_key_values
        images, price = grids(geometry, sample), trace.cost()
        outside = vision_flops(geometry.vision, images) + projector_flops(geometry.vision, images)
        assert counted.flops == price.pruned.exact_flops + outside
        assert price.pruned.kv_bytes == held(cache, dtype_bytes=2)
        assert (price.share("exact_flops") < 1) == (pruner != Unpruned())
        with prune(model, pruner), counting() as counted:
            model(input_ids=sample["input_ids"][:, -1:], past_key_values=cache)
        assert counted.flops == price.pruned.decode_flops


@pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
def test_a_token_decoded_on_a_pruned_cache_costs_what_the_cost_model_says(pruner):
    small = tiny.build("llava", layers=3)
    model, geometry, sample = countable(small), Geometry.from_config(small.model.config), small.samples[0]
    with prune(model, pruner) as trace:
        cache = model(**sample, use_cache=True).past_key_values
        schedule = tuple(counts[0] for counts in trace.image_tokens)
        text = trace.tokens[0][0] - schedule[0]
        for step in (1, 2):
            with counting() as counted:
                model(input_ids=sample["input_ids"][:, -1:], past_key_values=cache)
            assert counted.flops == decode_flops(geometry, schedule, text, step=step)


def test_a_batch_costs_its_samples():
    small = tiny.build("llava", layers=3)
    with prune(small.model, PRUNERS[0]) as trace:
        small.model(**small.collate(small.samples))
        together = trace.cost()
    alone = []
    for sample in small.samples:  # a session each: a trace is of the newest prompt with an image, where there was one
        with prune(small.model, PRUNERS[0]) as trace:
            small.model(**sample)
            alone.append(trace.cost())
    assert together == sum(alone[1:], alone[0])
    assert together.samples == len(small.samples)


@pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
def test_a_text_alone_pays_for_no_ranking(pruner):
    small = tiny.build("llava", layers=3)
    text = {key: value for key, value in small.sample([9]).items() if key != "pixel_values"}
    with prune(countable(small), pruner) as trace, counting() as counted:
        small.model(**text, logits_to_keep=1)
    price = trace.cost()
    assert counted.flops == price.pruned.exact_flops == price.unpruned.exact_flops
    assert price.pruned.score_flops == 0


def test_a_prompt_with_a_past_is_not_priced():
    small = tiny.build("llava", layers=3)
    sample = small.samples[0]
    with prune(small.model, PRUNERS[0]) as trace:
        cache = small.model(**sample, use_cache=True).past_key_values
        more = {key: value for key, value in sample.items() if key != "attention_mask"}
        small.model(**more, past_key_values=cache)
        with pytest.raises(ValueError, match="only a prompt read into an empty cache can be priced"):
            trace.cost()
