"""Calls that end without a word, and calls inside calls."""

import copy

import pytest
import torch

import tiny
from vlmflow import FastV, HiMAP, PyramidDrop, prune

PRUNERS = [HiMAP(k1=2, r1=0.5, k2=4, r2=0.5), FastV(2, 0.5), PyramidDrop((1, 3), 0.5)]
PLACES = {
    "vision tower": lambda model: model.model.vision_tower,
    "embeddings": lambda model: model.get_input_embeddings(),
    "queries of the layer that ranks": lambda model: model.model.language_model.layers[1].self_attn.q_proj,
    "a layer behind a drop": lambda model: model.model.language_model.layers[3].mlp,
    "the head": lambda model: model.lm_head,
}


@pytest.fixture
def own():
    return copy.deepcopy(tiny.build("llava").model)


def answer(model, sample, trace):
    """Logits of a prompt, then of two tokens read on top of it, and what stayed."""
    with torch.no_grad():
        out = model(**sample, use_cache=True)
        tokens = torch.tensor([[5, 6]], device=tiny.DEVICE)
        following = model(input_ids=tokens[:, :1], past_key_values=out.past_key_values).logits
    return out.logits, following, [kept[0].tolist() for kept in trace.kept]


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
@pytest.mark.parametrize("place", PLACES)
def test_after_an_interrupt_the_next_prompt_is_right(own, place, pruner):
    """Ctrl-C, after which torch runs no hook; the next prompt has another layout."""
    first, second = tiny.build("llava").samples[:2]
    with prune(own, pruner) as trace:
        expected = answer(own, second, trace)
    with prune(own, pruner) as trace:
        handle = PLACES[place](own).register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            answer(own, first, trace)
        handle.remove()
        got = answer(own, second, trace)
    assert got[2] == expected[2]
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
def test_a_model_may_be_called_inside_its_own_call(own, pruner):
    """From a hook of a layer in the middle: another prompt, and a token on top of it."""
    first, second = tiny.build("llava").samples[:2]
    with prune(own, pruner) as trace:
        expected = answer(own, first, trace)
        inner_expected = answer(own, second, trace)
    inside = []

    def call_again(*_):
        handle.remove()
        inside.append(answer(own, second, trace))

    with prune(own, pruner) as trace:
        handle = own.model.language_model.layers[2].register_forward_hook(call_again)
        got = answer(own, first, trace)
    assert got[2] == expected[2]
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    assert torch.equal(inside[0][0], inner_expected[0])
    assert torch.equal(inside[0][1], inner_expected[1])
