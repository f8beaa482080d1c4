"""Taps see every call of their layers, know which positions it is about, and may change what comes out."""

import weakref
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from packaging.version import Version

import tiny
from vlmflow import VTW, HiMAP, PyramidDrop, Unpruned, attach
from vlmflow.engine.cache import UNUSED

PRUNERS = [Unpruned(), HiMAP(2, 0.5, 4, 0.5), PyramidDrop((1, 3)), VTW(3)]
NEW = 3


@dataclass
class Witness:
    """Lets every call pass, and writes down its positions."""

    layers: tuple[int, ...] = tuple(range(6))
    seen: dict[int, list] = field(default_factory=dict)

    def __call__(self, call):
        self.seen.setdefault(call.layer, []).append((call.query_position, call.key_position))
        assert call.query_position.shape[1] == call.kernel.query.shape[2]
        assert call.key_position.shape[1] == call.kernel.key.shape[2]
        return call.kernel.run()


def answer(model, batch, **kwargs):
    return model.generate(
        **batch, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True, **kwargs
    )


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3_window"])
@pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
def test_a_witness_changes_nothing_and_knows_where_it_is(family, pruner, cache):
    small = tiny.build(family)
    batch = small.collate(small.samples)
    how = {
        "dynamic": {},
        "static": {"cache_implementation": "static", "disable_compile": True},
        "none": {"use_cache": False},
    }[cache]
    if cache == "static" and family == "gemma3_window" and Version(transformers.__version__) < Version("5.12"):
        pytest.skip("transformers keeps the static cache of a call that failed, half made")
    if cache == "static" and family == "gemma3_window" and pruner != Unpruned():
        with attach(small.model, pruner), pytest.raises(ValueError, match="a KV cache with sliding-window layers"):
            answer(small.model, batch, **how)
        return
    with attach(small.model, pruner):
        expected = answer(small.model, batch, **how)
    witness, length = Witness(), batch["input_ids"].shape[1]
    with attach(small.model, pruner, [witness]) as trace:
        out = answer(small.model, batch, **how)
        kept = trace.kept[:]
    assert all(torch.equal(one, other) for one, other in zip(out.logits, expected.logits, strict=True))
    for layer, calls in witness.seen.items():
        assert len(calls) == NEW
        query, key = calls[0]
        image = trace.layout.image[:, :length]
        for sample in range(len(small.samples)):
            there = query[sample][query[sample] < length]
            assert (there.diff() > 0).all()
            if cache != "none":  # without a cache, the record is of the last step
                assert there[image[sample, there]].tolist() == kept[layer][sample].tolist()
        if cache == "dynamic":
            query, key = calls[-1]
            assert query.tolist() == [[length + NEW - 2]] * len(small.samples)
            assert (key[:, -1] == length + NEW - 2).all()
            assert ((key < length + NEW) | (key == UNUSED)).all()


def test_a_tap_may_replace_the_output():
    """Attention that is all zeros, in one layer."""
    small = tiny.build("llava")

    @dataclass
    class Silence:
        layers: tuple[int, ...] = (2,)

        def __call__(self, call):
            out, weights = call.kernel.run()
            return torch.zeros_like(out), weights

    inputs = []
    layer = small.model.model.language_model.layers[2]
    handle = layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with attach(small.model, taps=[Silence()]), torch.no_grad():
        small.model(**small.samples[0])
    handle.remove()
    assert (inputs[0] == 0).all()


def test_taps_stack():
    """The later tap wraps the earlier one."""
    small, order = tiny.build("llava"), []

    def named(name):
        @dataclass
        class Named:
            layers: tuple[int, ...] = (1,)

            def __call__(self, call):
                order.append(name)
                return call.kernel.run()

        return Named()

    with attach(small.model, taps=[named("inner"), named("outer")]), torch.no_grad():
        small.model(**small.samples[0])
    assert order == ["outer", "inner"]


def test_a_tap_outside_the_model_is_refused():
    with pytest.raises(ValueError, match="a tap wants layer 6, but this model has layers 0 to 5"):
        attach(tiny.build("llava").model, taps=[Witness(layers=(6,))])


def test_a_failing_tap_leaves_nothing():
    small = tiny.build("llava")
    attention = small.model.model.language_model.layers[2].self_attn

    @dataclass
    class Fails:
        layers: tuple[int, ...] = (1, 2)

        def __call__(self, call):
            raise KeyError("on purpose")

    config = attention.config
    with attach(small.model, taps=[Fails()]), pytest.raises(KeyError):
        small.model(**small.samples[0])
    assert attention.config is config


@dataclass
class Keys:
    """Notes which of the keys that it saw before are still in memory."""

    layers: tuple[int, ...] = (1, 2)
    seen: list = field(default_factory=list)
    alive: list = field(default_factory=list)

    def __call__(self, call):
        self.alive.append([ref() is not None for ref in self.seen])
        self.seen.append(weakref.ref(call.kernel.key))
        return call.kernel.run()


def test_the_layer_that_ranked_is_let_go_once_it_has():
    """Its keys are not held while later layers run; without a cache nobody else holds them."""
    small, keys = tiny.build("llava"), Keys()
    with attach(small.model, HiMAP(2, 0.5, 4, 0.5), [keys]), torch.no_grad():
        small.model(**small.samples[0], use_cache=False)
    assert keys.alive == [[], [False]]
