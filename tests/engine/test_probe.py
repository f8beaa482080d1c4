"""Watching a layer changes nothing of it, and leaves nothing behind."""

import copy

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tiny
from vlmflow import HiMAP, prune
from vlmflow.engine.probe import KernelCall, unwatch_everywhere, watch

PRUNER = HiMAP(k1=2, r1=0.5, k2=4, r2=0.5)


@pytest.fixture(params=["sdpa", "eager"])
def subject(request):
    """A model of its own, with its third attention module and the tables in which it finds its kernel."""
    model = copy.deepcopy(tiny.build("llava").model)
    model.set_attn_implementation(request.param)
    attention = model.model.language_model.layers[2].self_attn
    modeling = type(attention).forward.__globals__

    def tables():
        return dict(ALL_ATTENTION_FUNCTIONS), modeling["eager_attention_forward"]

    return model, attention, tables


def test_a_watched_layer_goes_by_its_kernels_own_name(subject):
    """Modules branch on the name: MiniMax-M3, for one, has its sparse mask for eager and sdpa only."""
    model, attention, tables = subject
    sample, before, seen = tiny.build("llava").samples[0], tables(), []
    with torch.no_grad():
        expected = model(**sample).logits

    def watcher(call: KernelCall):
        seen.append((attention.config._attn_implementation, type(attention.config).__name__))
        return call.run()

    watch(attention, watcher)
    seen.append((attention.config._attn_implementation, type(attention.config).__name__))
    with torch.no_grad():
        assert torch.equal(model(**sample).logits, expected)
    assert seen == [(model.config._attn_implementation, "LlamaConfig")] * 2
    assert tables() == before


def test_a_kernel_of_the_users_own_is_put_back(subject):
    model, attention, _ = subject
    if model.config._attn_implementation == "eager":
        pytest.skip("it is in no table")
    calls = []

    def own(*args, **kwargs):
        calls.append(1)
        return ALL_ATTENTION_FUNCTIONS._global_mapping["sdpa"](*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = own
    try:
        watch(attention, lambda call: call.run())
        with torch.no_grad():
            model(**tiny.build("llava").samples[0])
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
        assert calls
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_an_interrupt_leaves_nothing_behind(subject):
    """Ctrl-C in the layer that ranks, for which torch runs no hook."""
    model, _, tables = subject
    before = tables()

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.language_model.layers[1].self_attn.q_proj.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), torch.no_grad(), prune(model, PRUNER):
        model(**tiny.build("llava").samples[0])
    handle.remove()
    assert tables() == before


def test_an_unknown_kernel_option_is_refused(subject):
    """What the ranking does not know of may turn it around."""
    _, attention, _ = subject
    call = KernelCall(torch.ones(1), torch.ones(1), torch.ones(1), None, {"scaling": 0.5, "tilt": 1.5}, lambda: None)
    with pytest.raises(ValueError, match="is given 'tilt', which may change"):
        _ = call.scoring
    watch(attention, lambda call: call.run())
    unwatch_everywhere(attention)
