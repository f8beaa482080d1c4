"""What attention kernels are handed, and how much work the engine adds: counted, not timed."""

import copy
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tiny
from vlmflow import VTW, FastV, HiMAP, PyramidDrop, prune

PRUNERS = [HiMAP(k1=2, r1=0.5, k2=4, r2=0.5), FastV(k=2, ratio=0.5), PyramidDrop(layers=(2, 4)), VTW(k=3)]
SYNCHRONIZING = ["tolist", "item", "cpu", "nonzero", "numpy", "__bool__", "__int__", "__float__", "__index__"]


def flash_contract(module, query, key, value, attention_mask, scaling=None, position_ids=None, **kwargs):
    """Flash attention's contract in plain maths: 2-D padding masks, last query aligned with last key, no packing.

    One sample whose position ids jump would be read as several packed ones.
    """
    assert attention_mask is None or attention_mask.dim() == 2
    if position_ids is not None and query.shape[0] == 1:
        assert (position_ids.diff(dim=-1) == 1).all()
    n_query, n_key, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    position = torch.arange(n_key, device=query.device)
    visible = position <= position[n_key - n_query :, None]
    if attention_mask is not None:
        assert attention_mask.shape == (query.shape[0], n_key)
        visible = visible & attention_mask[:, None, None, :].bool()
    logits = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
    weights = torch.softmax(logits.masked_fill(~visible, -torch.inf), -1).nan_to_num(0.0)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), None


@pytest.fixture(scope="module", autouse=True)
def flash():
    name = "flash_emulated"
    ALL_ATTENTION_FUNCTIONS.register(name, flash_contract)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, flash_attention_mask)
    return name


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "mistral3", "internvl"])
@pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
def test_flash_attention_contract(family, pruner, flash):
    """The kept tokens and answers are those of SDPA, for a ragged batch and for single samples."""
    small = tiny.build(family)
    model = copy.deepcopy(small.model)
    text = next(module for name, module in model.named_modules() if name.endswith("language_model"))
    text.config._attn_implementation = flash
    for batch in (small.collate(small.samples), *small.samples):
        kwargs = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        with prune(small.model, pruner) as expected_trace:
            expected = small.model.generate(**batch, **kwargs)
        with prune(model, pruner) as trace:
            out = model.generate(**batch, **kwargs)
        for one, other in zip(trace.kept[5], expected_trace.kept[5], strict=True):
            assert torch.equal(one, other)
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)


def test_flash_attention_refuses_sliding_windows(flash):
    model = copy.deepcopy(tiny.build("gemma3_window").model)
    sample = tiny.build("gemma3_window").samples[0]
    model.model.language_model.config._attn_implementation = flash
    with prune(model, PRUNERS[0]), pytest.raises(ValueError, match="sliding window"):
        model.generate(**sample, max_new_tokens=2)


class Operations(TorchDispatchMode):
    """Counts the tensor operations that run."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def synchronizations(monkeypatch):
    """Counts calls that wait for the device."""
    count = Counter()

    def counting(name, real):
        def call(*args, **kwargs):
            count[name] += 1
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in SYNCHRONIZING:
            patch.setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))
        yield count


def prefill(model, sample):
    with torch.no_grad():
        return model(**sample, use_cache=True, logits_to_keep=1)


@pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
def test_decoding_without_padding_adds_no_operation(pruner):
    small = tiny.build("llava")
    sample, token, counts = small.samples[0], torch.tensor([[5]], device=tiny.DEVICE), []
    with torch.no_grad():
        cache = prefill(small.model, sample).past_key_values
        with Operations() as plain:
            small.model(input_ids=token, past_key_values=cache)
        with prune(small.model, pruner):
            cache = prefill(small.model, sample).past_key_values
            for _ in range(2):
                with Operations() as pruned:
                    small.model(input_ids=token, past_key_values=cache)
                counts.append(pruned.count)
    assert counts == [plain.count, plain.count]


def test_decoding_with_padding_narrows_the_mask_once_a_stage():
    """Six layers, two stages: as many gathers of the mask as stages, whatever the number of layers."""
    gathers = []
    for layers in (6, 9):
        small = tiny.build("llava", layers=layers)
        batch = small.collate(small.samples)
        token = torch.full((len(small.samples), 1), 5, device=tiny.DEVICE)
        mask = torch.cat([batch["attention_mask"], torch.ones_like(token)], 1)
        with torch.no_grad(), prune(small.model, PRUNERS[0]):
            cache = prefill(small.model, batch).past_key_values
            with Operations() as pruned:
                small.model(input_ids=token, attention_mask=mask, past_key_values=cache)
        gathers.append(pruned.count[torch.ops.aten.gather])
    assert gathers == [2, 2]


@pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
def test_a_prefill_waits_for_the_device_once(monkeypatch, pruner):
    """The prompt's counts are read in one go; decoding reads nothing."""
    small = tiny.build("llava")
    batch = small.collate(small.samples)
    token = torch.full((len(small.samples), 1), 5, device=tiny.DEVICE)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(token)], 1)
    with synchronizations(monkeypatch) as plain_prefill:
        cache = prefill(small.model, batch).past_key_values
    with synchronizations(monkeypatch) as plain_step, torch.no_grad():
        small.model(input_ids=token, attention_mask=mask, past_key_values=cache)
    with prune(small.model, pruner):
        with synchronizations(monkeypatch) as pruned_prefill:
            cache = prefill(small.model, batch).past_key_values
        with synchronizations(monkeypatch) as pruned_step, torch.no_grad():
            small.model(input_ids=token, attention_mask=mask, past_key_values=cache)
    assert pruned_prefill - plain_prefill == Counter(tolist=1)
    assert pruned_step == plain_step


@pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
@pytest.mark.parametrize("ragged", [False, True])
def test_a_prefill_adds_operations_by_stage_not_by_layer(pruner, ragged):
    """Whatever is narrowed is narrowed once a stage, however many layers use it; hooks begin at the scored layer."""
    added = []
    for layers in (6, 9):
        small = tiny.build("llava", layers=layers)
        prompt = small.collate(small.samples) if ragged else small.samples[0]
        with Operations() as plain:
            prefill(small.model, prompt)
        with prune(small.model, pruner), Operations() as pruned:
            prefill(small.model, prompt)
        added.append(pruned.count.total() - plain.count.total())
    assert added[0] == added[1]
    assert 0 < added[0] <= 200 * len(pruner.stages(6, 50))
