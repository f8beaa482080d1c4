"""A pruned KV cache away from the session that made it, and copies of a model that is attached."""

import copy
import io
import pickle

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import tiny
import vlmflow
from vlmflow import VTW, FastV, HiMAP, PyramidDrop, Unpruned, attach, prune

HIMAP = HiMAP(k1=2, r1=0.5, k2=4, r2=0.5)
PRUNERS = [HIMAP, FastV(k=2, ratio=0.5), PyramidDrop(layers=(2, 4)), VTW(k=3)]
pruners = pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
NEW = 5


@pytest.fixture(scope="module")
def llava():
    return tiny.build("llava")


@pytest.fixture(scope="module")
def batch(llava):
    return llava.collate(llava.samples)


def generate(model, inputs, n=NEW, **how):
    return model.generate(**inputs, max_new_tokens=n, do_sample=False, **how)


def begun(model, inputs, pruner):
    """The whole answer; and a cache that holds the prompt and its beginning, with what goes on from there."""
    cache = DynamicCache(config=model.config)
    with prune(model, pruner):
        whole = generate(model, inputs)
        ids = generate(model, inputs, 2, past_key_values=cache)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, -2:])], 1)
    return whole, cache, {"input_ids": ids, "attention_mask": mask}


@pruners
@pytest.mark.parametrize("other", [None, Unpruned(), FastV(k=5, ratio=0.5)], ids=repr)
def test_without_a_session_that_prunes_its_layers_it_refuses(llava, batch, pruner, other):
    _, cache, more = begun(llava.model, batch, pruner)
    session = None if other is None else attach(llava.model, other)
    try:
        with pytest.raises(RuntimeError, match="this KV cache holds a pruned prompt"):
            generate(llava.model, more, 3, past_key_values=cache)
        with torch.no_grad(), pytest.raises(RuntimeError, match="this KV cache holds a pruned prompt"):
            llava.model(input_ids=more["input_ids"][:, -2:], past_key_values=cache)
    finally:
        if session is not None:
            session.detach()


@pruners
@pytest.mark.parametrize("other", [FastV(k=1, ratio=0.2), VTW(k=2)], ids=repr)
def test_a_session_whose_pruner_begins_no_later_goes_on(llava, batch, pruner, other):
    whole, cache, more = begun(llava.model, batch, pruner)
    with prune(llava.model, other):
        assert torch.equal(generate(llava.model, more, 3, past_key_values=cache), whole)


@pruners
@pytest.mark.parametrize("saved", ["torch", "pickle", "copy", "deepcopy"])
def test_it_is_saved_and_copied_with_its_slots(llava, batch, pruner, saved):
    whole, cache, more = begun(llava.model, batch, pruner)
    if saved == "torch":
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        ways = {"pickle": lambda thing: pickle.loads(pickle.dumps(thing)), "copy": copy.copy, "deepcopy": copy.deepcopy}
        other = ways[saved](cache)
    assert [type(layer) for layer in other.layers] == [type(layer) for layer in cache.layers]
    with prune(llava.model, pruner):
        assert torch.equal(generate(llava.model, more, 3, past_key_values=other), whole)
    if saved != "copy":  # which shares its layers
        with prune(llava.model, pruner):
            assert torch.equal(generate(llava.model, more, 3, past_key_values=cache), whole)


def test_a_trace_is_saved(llava, batch):
    with prune(llava.model, HIMAP) as trace:
        generate(llava.model, batch)
    other = pickle.loads(pickle.dumps(trace))
    assert other.image_tokens == trace.image_tokens
    assert torch.equal(other.kept[5][0], trace.kept[5][0])
    assert other.cost() == trace.cost()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_an_attached_model_is_not_attached(llava, batch, how):
    plain = generate(llava.model, batch)
    model = type(llava.model)(llava.model.config).eval()  # a used one holds transformers' own hooks, never pickled
    model.load_state_dict(llava.model.state_dict())
    model.generation_config = llava.model.generation_config
    with prune(model, HIMAP) as trace:
        other = how(model)
        expected = generate(model, batch)
        assert torch.equal(generate(other, batch), plain)
        assert torch.equal(generate(model, batch), expected)
        seen = trace.kept[5]
        with prune(other, FastV(k=2, ratio=0.5)) as other_trace:
            generate(other, batch)
        assert trace.kept[5] is not seen
        assert all(map(torch.equal, trace.kept[5], seen))
        assert other_trace.image_tokens != trace.image_tokens
    assert torch.equal(generate(other, batch), plain)
    assert not torch.equal(expected, plain)


def test_a_model_whose_session_was_dropped_is_freed(llava, batch):
    model = copy.deepcopy(llava.model)
    plain = generate(model, batch)
    prune(model, HIMAP)
    with pytest.raises(ValueError, match=r"vlmflow\.detach\(model\)"):
        prune(model, HIMAP)
    vlmflow.detach(model)
    assert torch.equal(generate(model, batch), plain)
    with prune(model, HIMAP):
        pass
    vlmflow.detach(model)


def test_a_cache_of_an_unknown_class_is_refused(llava):
    class Odd(DynamicLayer):
        _layer_type = None

    cache = DynamicCache(config=llava.model.config)
    cache.layers = [Odd() for _ in cache.layers]
    with prune(llava.model, HIMAP), pytest.raises(ValueError, match="a KV cache of Odd cannot hold a pruned prompt"):
        llava.model(**llava.samples[0], past_key_values=cache)


def test_a_cache_of_another_make_is_refused(llava):
    """As recurrent families had in early versions of transformers."""

    class Own:
        def __init__(self):
            self.cache = DynamicCache(config=llava.model.config)

        def __getattr__(self, name):
            return getattr(self.cache, name)

    with prune(llava.model, HIMAP), pytest.raises(ValueError, match="a KV cache of Own cannot hold a pruned prompt"):
        llava.model(**llava.samples[0], past_key_values=Own())


def test_decoding_keeps_no_mask_of_earlier_steps(llava, batch):
    with prune(llava.model, HIMAP), torch.no_grad():
        out = llava.model(**batch, use_cache=True)
        mask, token = batch["attention_mask"], out.logits[:, -1:].argmax(-1)
        for _ in range(4):
            mask = torch.cat([mask, torch.ones_like(token)], 1)
            llava.model(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values)
        slots = {id(layer.vlmflow_slots): layer.vlmflow_slots for layer in out.past_key_values.layers[2:]}
    assert len(slots) == 2
    assert [len(slots._masks) for slots in slots.values()] == [1, 1]
