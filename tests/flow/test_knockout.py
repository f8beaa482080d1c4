"""Knock-outs against whole attention matrices edited by hand, and against pruning, which they must equal (law 2)."""

import gc
import weakref
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import tiny
from parameters import pruners
from vlmflow import VTW, HiMAP, Unpruned, attach, prune
from vlmflow.core.layout import Layout
from vlmflow.engine.cache import UNUSED
from vlmflow.flow.knockout import Knockout, random_positions

NEW = 3
families = pytest.mark.parametrize("family", tiny.FAMILIES)
kernels = pytest.mark.parametrize("attn", ["sdpa", "eager"])


def forward(model, inputs, taps=(), pruner=Unpruned()):  # noqa: B008 (frozen)
    with attach(model, pruner, taps) as trace, torch.no_grad():
        logits = model(**inputs).logits
        return logits, trace.layout, trace.kept[:]


def answer(model, inputs, taps=(), pruner=Unpruned(), **kwargs):  # noqa: B008
    with attach(model, pruner, taps):
        out = model.generate(
            **inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True, **kwargs
        )
    return torch.stack(out.logits)


@dataclass
class Edited:
    """The definition, restated: the whole attention matrix of every layer named, with weights edited in place."""

    layers: tuple[int, ...]
    source: str
    target: str
    how: str
    heads: tuple[int, ...] | None = None
    keep_diagonal: bool = False

    def part(self, name, layout, position):
        chosen = torch.zeros_like(position, dtype=torch.bool)
        for sample, row in enumerate(position.tolist()):
            for slot, there in enumerate(row):
                if there < layout.padding.shape[1]:
                    chosen[sample, slot] = bool(getattr(layout, name)[sample, there])
                else:
                    chosen[sample, slot] = name == "instruction" and there != UNUSED
        return chosen

    def __call__(self, call):
        kernel = call.kernel
        kernel.run()  # whoever else watches
        groups = kernel.query.shape[1] // kernel.key.shape[1]
        key, value = (tensor.repeat_interleave(groups, 1) for tensor in (kernel.key, kernel.value))
        scores = torch.einsum("bhqc,bhkc->bhqk", kernel.query, key) * (kernel.scoring.scaling or key.shape[-1] ** -0.5)
        seen = call.key_position[:, None, None, :] <= call.query_position[:, None, :, None]
        if kernel.mask is not None:
            seen = kernel.mask if kernel.mask.dtype == torch.bool else kernel.mask == 0
        scores = torch.where(seen, scores, -torch.inf)
        source = self.part(self.source, call.layout, call.key_position)
        target = self.part(self.target, call.layout, call.query_position)
        blocked = target[:, None, :, None] & source[:, None, None, :]
        if self.keep_diagonal:
            blocked = blocked & (call.query_position[:, None, :, None] != call.key_position[:, None, None, :])
        if self.heads is not None:
            everyone = torch.zeros_like(scores, dtype=torch.bool)
            everyone[:, list(self.heads)] = blocked
            blocked = everyone
        if self.how == "mask":
            scores = torch.where(blocked, -torch.inf, scores)
        weights = scores.softmax(-1).nan_to_num(0.0)
        if self.how == "zero":
            weights = torch.where(blocked, 0.0, weights)
        return (weights @ value).transpose(1, 2), None


def with_image(small):
    return [sample for sample in small.samples if any((sample["input_ids"] == i).any() for i in (100, 101))]


def real(batch):
    return batch["attention_mask"].bool()


PATHS = [
    {"source": "image", "target": "instruction"},
    {"source": "image", "target": "image"},
    {"source": "image", "target": "image", "keep_diagonal": True},
    {"source": "image", "target": "instruction", "heads": (1, 2)},
]


@families
@kernels
@pytest.mark.parametrize("how", ["zero", "mask"])
def test_equals_edited_attention(family, attn, how):
    """A left-padded batch with several images, by every path, in two layers."""
    small = tiny.build(family, attn)
    batch = small.collate(with_image(small))
    plain, _, _ = forward(small.model, batch)
    for path in PATHS:
        expected, _, _ = forward(small.model, batch, [Edited(layers=(1, 3), how=how, **path)])
        logits, _, _ = forward(small.model, batch, [Knockout(layers=(1, 3), how=how, **path)])
        torch.testing.assert_close(logits[real(batch)], expected[real(batch)], atol=1e-4, rtol=0)
        assert (logits - plain)[real(batch)].abs().max() > 1e-2


@kernels
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("pruner", [Unpruned(), HiMAP(2, 0.5, 4, 0.5)], ids=repr)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3_window"])
def test_holds_through_generation(family, pruner, cache, attn):
    if cache == "none" and pruner != Unpruned():
        pytest.skip("without a cache pruning ranks anew each step")
    small = tiny.build(family, attn)
    batch = small.collate(with_image(small))
    how = {
        "dynamic": {},
        "static": {"cache_implementation": "static", "disable_compile": True},
        "none": {"use_cache": False},
    }[cache]
    path = {"source": "image", "target": "instruction", "layers": (1, 3, 5)}
    if cache == "static" and family == "gemma3_window" and pruner != Unpruned():
        with pytest.raises(ValueError, match="a KV cache with sliding-window layers"):
            answer(small.model, batch, [Knockout(**path)], pruner, **how)
        return
    for way in ("zero", "mask"):
        expected = answer(small.model, batch, [Edited(how=way, **path)], pruner)
        steps = answer(small.model, batch, [Knockout(how=way, **path)], pruner, **how)
        torch.testing.assert_close(steps, expected, atol=1e-4, rtol=0)
    by_prompt = answer(small.model, batch, [Knockout(**path | {"target": positions(small, batch)})], pruner, **how)
    assert (by_prompt[0] - answer(small.model, batch, [Knockout(**path)], pruner)[0]).abs().max() < 1e-4
    assert (by_prompt[1:] - expected[1:]).abs().max() > 1e-3  # generated tokens belong to the instruction as well


def positions(small, batch, segment="instruction"):
    return forward(small.model, batch)[1].positions(segment)


def as_knockouts(layout, kept, n_layers):
    """What pruning does, said through knock-outs: in each layer nobody sees the image tokens that are gone."""
    taps = []
    for layer in range(n_layers):
        gone = [
            sorted(set(image.tolist()) - set(there.tolist()))
            for image, there in zip(layout.positions("image"), kept[layer], strict=True)
        ]
        if any(gone):
            taps.append(Knockout(gone, "all", (layer,), how="mask"))
    return taps


@families
@kernels
@pruners
def test_pruning_is_knocking_out(family, attn, pruner):
    """Law 2: text logits of a pruned, left-padded batch, a text-only sample in it, and of its generation."""
    small = tiny.build(family, attn)
    batch = small.collate([*small.samples, small.sample([6], seed=9)])
    pruned, layout, kept = forward(small.model, batch, pruner=pruner)
    taps = as_knockouts(layout, kept, 6)
    knocked, _, _ = forward(small.model, batch, taps)
    text = real(batch) & ~layout.image
    assert (pruned - knocked)[text].abs().max() < 1e-4
    steps = answer(small.model, batch, pruner=pruner)
    assert (steps - answer(small.model, batch, taps)).abs().max() < 1e-4


@dataclass
class Witness:
    """Writes down what a layer's attention gives to whoever wraps it."""

    layers: tuple[int, ...]
    seen: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, call):
        out, weights = call.kernel.run()
        self.seen[call.layer] = out
        return out, weights


def test_other_layers_and_rows_keep_every_bit():
    """Only the layer named gives something else than its kernel, and only in rows that lose something."""
    small = tiny.build("llava")
    inside, outside = Witness(tuple(range(6))), Witness(tuple(range(6)))
    _, layout, _ = forward(small.model, small.samples[0], [inside, Knockout("image", "instruction", (3,)), outside])
    for layer in range(6):
        one, other = inside.seen[layer][0], outside.seen[layer][0]
        if layer != 3:
            assert torch.equal(one, other)
        else:
            rest = ~layout.instruction[0]
            assert torch.equal(one[rest], other[rest])
            assert ((one - other)[~rest].abs().amax((1, 2)) > 1e-4).all()


@kernels
@pytest.mark.parametrize("how", ["zero", "mask"])
def test_a_query_without_keys_attends_to_nothing(attn, how):
    small, outside = tiny.build("llava", attn), Witness((2,))
    batch = small.collate(small.samples[:3])
    _, layout, _ = forward(small.model, batch, [Knockout("all", "instruction", (2,), how=how), outside])
    assert (outside.seen[2][layout.instruction] == 0).all()
    assert (outside.seen[2][layout.image] != 0).any()


@kernels
def test_heads_are_blocked_alone(attn):
    small, inside, outside = tiny.build("llava", attn), Witness((2,)), Witness((2,))
    forward(small.model, small.samples[0], [inside, Knockout("image", "instruction", (2,), heads=[3]), outside])
    changed = (inside.seen[2] - outside.seen[2]).abs().amax((0, 1, 3))
    assert (changed[:3] == 0).all()
    assert changed[3] > 1e-3


@pytest.mark.parametrize("how", ["zero", "mask"])
def test_knockouts_of_one_layer_act_together(how):
    """Blocking in two goes, overlapping, is blocking at once; in any order, and around another tap."""
    small = tiny.build("llava")
    sample = small.samples[1]
    where = forward(small.model, sample)[1].positions("image")[0].tolist()
    whole = Knockout("image", "instruction", (1, 2), how=how)
    first, second = (Knockout([part], "instruction", (1, 2), how=how) for part in (where[:15], where[10:]))
    expected, _, _ = forward(small.model, sample, [whole])
    for taps in ([first, second], [second, first]):
        logits, _, _ = forward(small.model, sample, taps)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_zero_and_mask_stack():
    """Masked keys leave the softmax first; zeroed ones keep their share of what is left."""
    small, seen = tiny.build("llava", "eager"), []
    sample = small.samples[0]
    with attach(
        small.model, taps=[Knockout("image", "instruction", (2,)), Knockout("system", "all", (2,), how="mask")]
    ):
        handle = small.model.model.language_model.layers[2].self_attn.register_forward_hook(
            lambda module, args, output: seen.append(output[1][0])
        )
        with torch.no_grad():
            small.model(**sample)
        handle.remove()
    _, layout, _ = forward(small.model, sample)
    system, image, instruction = layout.system[0], layout.image[0], layout.instruction[0]
    weights = seen[0][:, instruction]
    assert (weights[..., system | image] == 0).all()
    left = weights.sum(-1)
    assert ((left > 0) & (left < 1)).all()
    torch.testing.assert_close(seen[0][:, image].sum(-1), torch.ones_like(seen[0][:, image].sum(-1)))


def test_gradients_flow():
    small = tiny.build("llava")
    with attach(small.model, taps=[Knockout("image", "instruction", (2,))]):
        small.model(**small.samples[0]).logits[0, -1, 5].backward()
    weight = small.model.model.language_model.layers[2].self_attn.v_proj.weight
    assert weight.grad.abs().sum() > 0
    small.model.zero_grad(set_to_none=True)


def test_a_shared_mask_stays_as_it_is():
    """Left padding makes the model build a mask for all layers: layers after the blocked one still see the image."""
    small = tiny.build("llava", "eager")
    batch, masks = small.collate(small.samples[:3]), []
    handle = small.model.model.language_model.layers[5].register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"].clone()), with_kwargs=True
    )
    forward(small.model, batch)
    forward(small.model, batch, [Knockout("image", "instruction", (1,), how="mask")])
    handle.remove()
    assert torch.equal(*masks)


def test_the_script_leaks_into_later_layers():
    """It writes into the mask that all layers are handed, so that what it says of one layer is true of all after it."""
    small = tiny.build("llava", "eager")
    batch = small.collate(small.samples[:3])
    _, layout, _ = forward(small.model, batch)

    def script(module, args, kwargs):
        mask = kwargs["attention_mask"]
        blocked = (layout.instruction[:, :, None] & layout.image[:, None, :])[:, None]
        mask.masked_fill_(blocked, torch.finfo(mask.dtype).min)

    handle = small.model.model.language_model.layers[2].register_forward_pre_hook(script, with_kwargs=True)
    leaked, _, _ = forward(small.model, batch)
    handle.remove()
    reach, _, _ = forward(small.model, batch, [Knockout("image", "instruction", range(2, 6), how="mask")])
    named, _, _ = forward(small.model, batch, [Knockout("image", "instruction", (2,), how="mask")])
    torch.testing.assert_close(leaked[real(batch)], reach[real(batch)], atol=1e-4, rtol=0)
    assert (leaked - named)[real(batch)].abs().max() > 1e-2


def test_lets_go_of_q_k_and_v():
    """By reference count alone: waiting for the garbage collector would hold a GPU's memory."""
    small, alive = tiny.build("llava"), []

    @dataclass
    class Holds:
        layers: tuple[int, ...] = (1, 2)

        def __call__(self, call):
            alive.extend(weakref.ref(tensor) for tensor in (call.kernel.query, call.kernel.key, call.kernel.value))
            return call.kernel.run()

    gc.disable()
    try:
        forward(small.model, small.samples[0], [Knockout("image", "instruction", (1,)), Holds()])
        assert len(alive) == 6
        assert not any(reference() is not None for reference in alive)
    finally:
        gc.enable()


def test_few_rows_at_a_time(monkeypatch):
    small = tiny.build("llava")
    sample, knockout = small.samples[1], Knockout("image", "image", (1, 2), how="mask")
    expected, _, _ = forward(small.model, sample, [knockout])
    monkeypatch.setattr("vlmflow.flow.knockout._ROW_BUDGET", 1000)
    logits, _, _ = forward(small.model, sample, [knockout])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_random_positions_are_a_control():
    image = torch.zeros(2, 20, dtype=torch.bool)
    image[0, 6:12], image[1, 9:15] = True, True
    padding = torch.zeros_like(image)
    padding[1, :3] = True
    layout = Layout(image, padding)
    drawn = random_positions(layout, seed=3)
    assert [len(sample) for sample in drawn] == [8, 5]
    assert drawn == random_positions(layout, seed=3)
    assert drawn != random_positions(layout, seed=4)
    for sample in range(2):
        assert all((layout.image | layout.instruction)[sample, there] for there in drawn[sample])
    alone = Layout(image[1:, 3:], padding[1:, 3:])
    assert random_positions(alone, seed=3)[0] == tuple(there - 3 for there in drawn[1])
    text = random_positions(layout, among=("system", "instruction"))
    assert not any(image[sample, there] for sample in range(2) for there in text[sample])
    with pytest.raises(ValueError, match="sample 0 has 8 instruction tokens, but only 6 among system"):
        random_positions(layout, among=("system",))
    with pytest.raises(ValueError, match="segment must be one of"):
        random_positions(layout, like="text")


def test_a_control_leaves_the_instruction_alone():
    small = tiny.build("llava")
    sample = small.samples[0]
    _, layout, _ = forward(small.model, sample)
    control = Knockout("image", random_positions(layout), range(2))
    logits, _, _ = forward(small.model, sample, [control])
    assert not torch.equal(logits, forward(small.model, sample)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "picture"}, "source must be one of system, image, instruction, all, or positions"),
        ({"target": "picture"}, "target must be one of"),
        ({"source": [[], []]}, "source names no position in any sample"),
        ({"source": [[3, -1]]}, "negative position"),
        ({"layers": ()}, "layers is empty"),
        ({"heads": ()}, "heads must name query heads"),
        ({"heads": (-1,)}, "heads must name query heads"),
        ({"how": "hide"}, "how must be 'zero' or 'mask', got 'hide'"),
    ],
)
def test_bad_settings_are_refused(change, message, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # its own check would come first
    settings = {"source": "image", "target": "instruction", "layers": (1,)} | change
    with pytest.raises(ValueError, match=message):
        Knockout(**settings)


@pytest.mark.parametrize(
    ("knockout", "message"),
    [
        (Knockout("image", "instruction", (6,)), "layer 6, but this model has layers 0 to 5"),
        (Knockout("image", "instruction", (1,), heads=(4,)), "heads names 4, but layer 1 has heads 0 to 3"),
        (Knockout([[7]], "instruction", (1,)), "source names positions for 1 samples, but the batch has 2 rows"),
        (Knockout([[7], [0]], "instruction", (1,)), "source names a position of sample 1 that is padding"),
    ],
)
def test_what_does_not_fit_is_refused(knockout, message):
    small = tiny.build("llava")
    batch = small.collate([small.samples[0], small.samples[2]])
    with pytest.raises(ValueError, match=message):
        forward(small.model, batch, [knockout])
    with prune(small.model, VTW(3)), torch.no_grad():  # and nothing is left behind
        small.model(**batch)


def test_a_sample_without_the_segment_is_named():
    small = tiny.build("llava")
    batch = small.collate([small.samples[0], small.sample([6])])
    with pytest.raises(ValueError, match="sample 1 of the batch has no image token"):
        forward(small.model, batch, [Knockout("image", "instruction", (1,))])
