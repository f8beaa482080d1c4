"""The engine's laws, over every family and pruner: what pruning must never change, and exactly what it does change."""

import math

import pytest
import torch

import oracles
import tiny
from parameters import KERNELS, PRUNERS, families, kernels, pruners
from vlmflow import FastV, HiMAP, PyramidDrop, Random, Uniform, prune

KEEP_ALL = [HiMAP(2, 0.0, 4, 0.0), FastV(2, 0.0), PyramidDrop((2, 4), 0.0), Random(2, 0.0), Uniform(2, 0.0)]
NEW = 4


def answer(model, batch, **kwargs):
    return model.generate(
        **batch,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )


@families
@kernels
@pytest.mark.parametrize("pruner", KEEP_ALL, ids=repr)
def test_keeping_everything_changes_no_bit(family, attn, pruner):
    """Law 1. Nothing is skipped when nothing is dropped: ranking, gathering and the pruned cache all run."""
    small = tiny.build(family, attn)
    batch = small.collate(small.samples)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected, generated = small.model(**batch).logits, answer(small.model, batch)
        with prune(small.model, pruner) as trace:
            logits, pruned = small.model(**batch).logits, answer(small.model, batch)
    assert trace.image_tokens[-1] == trace.image_tokens[0]
    assert torch.equal(logits[real], expected[real])
    assert torch.equal(pruned.sequences, generated.sequences)
    assert all(torch.equal(one, other) for one, other in zip(pruned.logits, generated.logits, strict=True))
    assert any("Pruned" in type(layer).__name__ for layer in pruned.past_key_values.layers)


@families
@pruners
def test_pruning_is_what_the_formulas_say(family, pruner):
    """Laws 2, 3 and 5, one sample at a time, against restatements that mask keys and keep no cache."""
    slow = tiny.build(family, "eager")
    for sample in slow.samples:
        kept, margin = oracles.kept_sets(pruner, slow.model, sample)
        if margin < 1e-5:
            continue  # a tie: sliding windows can leave tokens that no query sees
        expected, _ = oracles.masked_forward(slow.model, sample, oracles.drops(slow.model, sample, kept))
        tokens, steps = oracles.reference_generate(slow.model, sample, pruner, NEW)
        for attn in KERNELS:
            model = tiny.build(family, attn).model
            with prune(model, pruner) as trace, torch.no_grad():
                logits = model(**sample).logits[0]
                generated = answer(model, sample)
            for layer, positions in kept.items():
                assert trace.kept[layer][0].tolist() == positions  # law 5
            text = ~trace.layout.image[0]
            torch.testing.assert_close(logits[text], expected[text], atol=1e-4, rtol=0)  # law 2
            torch.testing.assert_close(torch.cat(generated.logits), steps, atol=1e-4, rtol=0)  # law 3
            assert generated.sequences[0, -NEW:].tolist() == tokens


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_few_samples_tie(family):
    """The law above skips ties; they must stay the exception."""
    small = tiny.build(family, "eager")
    for pruner in PRUNERS:
        margins = [oracles.kept_sets(pruner, small.model, sample)[1] for sample in small.samples]
        assert family == "gemma3_window" or all(margin > 1e-5 for margin in margins), (pruner, margins)
        assert any(margin > 1e-5 for margin in margins), (pruner, margins)


@families
@kernels
@pruners
def test_a_ragged_batch_equals_its_samples(family, attn, pruner):
    """Law 4, through generation; the batch has a text-only sample."""
    small = tiny.build(family, attn)
    samples = [*small.samples, small.sample([6], seed=9)]
    batch = small.collate(samples)
    with prune(small.model, pruner) as together_trace, torch.no_grad():
        together = answer(small.model, batch)
    for number, sample in enumerate(samples):
        with prune(small.model, pruner) as trace, torch.no_grad():
            alone = answer(small.model, sample)
        padding = batch["input_ids"].shape[1] - sample["input_ids"].shape[1]
        for layer in range(trace.n_layers):
            assert torch.equal(together_trace.kept[layer][number] - padding, trace.kept[layer][0])
        for step, other in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(step[number], other[0], atol=1e-4, rtol=0)


@kernels
@pruners
def test_a_ragged_batch_without_padding(attn, pruner):
    """Law 4 where prompts are equally long, so that the model needs no mask, but hold one image or two."""
    small = tiny.build("llava", attn)
    samples = [small.sample([10, "image", 27], seed=1), small.sample([5, "image", "image", 7], seed=2)]
    assert samples[0]["input_ids"].shape == samples[1]["input_ids"].shape
    with prune(small.model, pruner), torch.no_grad():
        for cache in ("dynamic", "static"):
            how = {"cache_implementation": cache, "disable_compile": True}
            together = answer(small.model, small.collate(samples), **how)
            for number, sample in enumerate(samples):
                alone = answer(small.model, sample, **how)
                for step, other in zip(together.logits, alone.logits, strict=True):
                    torch.testing.assert_close(step[number], other[0], atol=1e-4, rtol=0)


@families
@pruners
def test_cache_lengths_are_predicted(family, pruner):
    """Law 8: each layer's cache holds the text, and the image tokens that the schedule says."""
    small = tiny.build(family)
    for sample in small.samples:
        ids = sample["input_ids"]
        n_image = int(sum((ids == token).sum() for token in (tiny.IMAGE, tiny.VIDEO)))
        schedule = pruner.schedule(6, n_image)
        with prune(small.model, pruner) as trace:
            cache = answer(small.model, sample).past_key_values
        lengths = [ids.shape[1] - n_image + kept for kept in schedule]
        assert list(trace.kv_lengths) == lengths
        for layer, length in zip(cache.layers, lengths, strict=True):
            window = layer.sliding_window - 1 if layer.is_sliding else math.inf
            assert layer.keys.shape[-2] == min(length + NEW - 1, window)
