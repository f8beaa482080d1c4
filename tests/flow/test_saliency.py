"""Law 9: saliency equals naive autograd that keeps every attention matrix, and finite differences."""

import copy
import gc
import math
import weakref
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import oracles
import tiny
from vlmflow import HiMAP, attach, prune
from vlmflow.flow.prediction import likeliest, spellings
from vlmflow.flow.saliency import Collector, extend, saliency

families = pytest.mark.parametrize("family", tiny.FAMILIES)
forms = pytest.mark.parametrize("form", ["paper", "released"])
LAYERS = 6


def seen(small):
    """The samples with an image; saliency is refused for others."""
    return [sample for sample in small.samples if any((sample["input_ids"] == i).any() for i in (100, 101))]


def naive(family, sample, answer, form):
    """I(i, j) of every layer of one unpadded sample, from the attention matrices that an eager model hands out."""
    slow = tiny.build(family, "eager").model
    steps = len(answer)
    for token in answer[:-1]:
        sample = oracles.extend(slow, sample, token)
    out = slow(**sample, use_cache=False, output_attentions=True)
    loss = F.cross_entropy(out.logits[0, -steps:].float(), torch.tensor(answer))
    gradients = torch.autograd.grad(loss, out.attentions)
    maps = []
    for weights, gradient in zip(out.attentions, gradients, strict=True):
        product = weights[0].detach().float() * gradient[0].float()
        maps.append(product.sum(0).abs() if form == "paper" else (product * weights[0].detach()).abs().mean(0))
    return torch.stack(maps), float(loss.detach()), sample


def close(got, expected):
    """Within 5e-5 of the largest value: other kernels round otherwise, in float32."""
    scale = expected.abs().max().clamp(min=1e-12)
    assert (got - expected).abs().max() / scale < 5e-5, (got, expected)


@families
@forms
def test_equals_naive_autograd(family, form):
    """Law 9: blocks, every position's flow, and whole maps, sample by sample of a left-padded batch."""
    small = tiny.build(family)
    samples = seen(small)
    answers = [[7 + number] for number in range(len(samples))]
    batch = small.collate(samples)
    result = saliency(small.model, batch, answers, form=form, record=range(LAYERS))
    width = batch["input_ids"].shape[1]
    for number, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
        maps, loss, _ = naive(family, sample, answer, form)
        assert abs(float(result.loss[number]) - loss) < 1e-4
        start = width - maps.shape[1]
        image = ((sample["input_ids"] == 100) | (sample["input_ids"] == 101))[0]
        system, instruction = image.cumsum(0) == 0, ~image & (image.cumsum(0) > 0)
        for layer in range(LAYERS):
            whole = result.maps[layer][number]
            close(whole[start:, start:], maps[layer])
            assert (whole[:start] == 0).all()
            assert (whole[:, :start] == 0).all()
            for t, target in enumerate((system, image, instruction)):
                close(result.flow[layer, number, t, start:], maps[layer][target].sum(0))
                for s, source in enumerate((system, image, instruction)):
                    expected = maps[layer][target][:, source].double().sum()
                    torch.testing.assert_close(result.blocks[layer, number, t, s], expected, rtol=1e-4, atol=1e-9)
        measures(result, number, maps.double(), system, image, instruction, form)


def measures(result, number, maps, system, image, instruction, form):
    """Eq. 2 to 6, restated; the released sums, too."""

    def same(got, expected):
        assert torch.allclose(got[:, number], expected, rtol=1e-4, atol=1e-9, equal_nan=True)

    for got, part in ((result.s_sys, system), (result.s_img, image), (result.s_ins, instruction)):
        ours = maps[:, part, :] if form == "released" else maps[:, :, part]
        same(got, ours.sum((1, 2)) / int(part.sum()) if part.any() else torch.full((LAYERS,), math.nan).double())
    n_image = 1 if form == "released" else int(image.sum())
    same(result.s_vv, maps[:, image][:, :, image].sum((1, 2)) / n_image)
    same(result.s_vt, maps[:, instruction][:, :, image].sum((1, 2)) / n_image)
    assert result.patches(number).shape == (LAYERS, int(image.sum()))
    close(result.patches(number).double(), maps[:, instruction][:, :, image].sum(1))
    close(result.patches(number, into="image").double(), maps[:, image][:, :, image].sum(1))


@families
def test_mean_over_an_answer(family):
    """Teacher forcing, with answers of different lengths in one batch."""
    small = tiny.build(family)
    samples = seen(small)
    answers = [[7, 20, 31, 9], [8], [9, 40]][: len(samples)] + [[5, 6, 7]] * (len(samples) - 3)
    batch = small.collate(samples)
    result = saliency(small.model, batch, answers, over="mean")
    width = batch["input_ids"].shape[1]
    for number, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
        maps, loss, longer = naive(family, sample, answer, "paper")
        assert abs(float(result.loss[number]) - loss) < 1e-4
        start = width - sample["input_ids"].shape[1]
        image = ((longer["input_ids"] == 100) | (longer["input_ids"] == 101))[0]
        instruction = ~image & (image.cumsum(0) > 0)
        n_image = int(image.sum())
        assert result.layout.instruction[number].sum() == instruction.sum()
        for layer in range(LAYERS):
            close(result.flow[layer, number, 2, start : start + len(image)], maps[layer][instruction].sum(0))
        expected = maps[:, instruction][:, :, image].sum((1, 2)).double() / n_image
        torch.testing.assert_close(result.s_vt[:, number], expected, rtol=1e-4, atol=1e-9)


def test_first_token_of_an_answer():
    small = tiny.build("llava")
    sample = small.samples[0]
    expected = saliency(small.model, sample, 7)
    for target in ([[7, 20, 31]], [7], torch.tensor([7])):
        assert torch.equal(saliency(small.model, sample, target).flow, expected.flow)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_equals_finite_differences(family):
    """sum over heads of A * dL/dA at (i, j) is the slope of L as A(i, j) grows by a share in all heads at once."""
    small = tiny.build(family)
    sample = small.samples[1]
    result = saliency(small.model, sample, 7, record=range(LAYERS))
    model = copy.deepcopy(small.model).double()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in sample.items()}

    @dataclass
    class Nudge:
        layers: tuple[int, ...]
        pair: tuple[int, int]
        share: float

        def __call__(self, call):
            kernel = call.kernel
            groups = kernel.query.shape[1] // kernel.key.shape[1]
            key, value = (tensor.repeat_interleave(groups, 1) for tensor in (kernel.key, kernel.value))
            scores = kernel.query @ key.transpose(2, 3) * kernel.scoring.scaling
            later = torch.ones(scores.shape[-2:]).triu(1).bool()
            weights = scores.masked_fill(later, -torch.inf).softmax(-1)
            weights[0, :, *self.pair] *= 1 + self.share
            return (weights @ value).transpose(1, 2), None

    def loss(layer, pair, share):
        with attach(model, taps=[Nudge((layer,), pair, share)]), torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[0, -1]
        return float(F.cross_entropy(logits, torch.tensor(7)))

    def slope(layer, pair, h=0.02):
        """Of fourth order: the models' norms compute in float32 whatever they are given, so h cannot be small."""
        near, far = (loss(layer, pair, h * n) - loss(layer, pair, -h * n) for n in (1, 2))
        return (8 * near - far) / (12 * h)

    length = sample["input_ids"].shape[1]
    for layer in range(LAYERS):
        largest = result.maps[layer][0].flatten().argsort(descending=True)
        for pair in (divmod(int(largest[rank]), length) for rank in (0, 1, 7, 40)):
            got = float(result.maps[layer][0][pair])
            assert got == pytest.approx(abs(slope(layer, pair)), rel=1e-3, abs=2e-4)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3_window", "paligemma", "qwen3_vl_moe"])
def test_checkpointing_and_kernels_change_nothing(family, attn):
    small = tiny.build(family, attn)
    batch = small.collate(seen(small)[:3])
    expected = saliency(tiny.build(family).model, batch, 7)
    result = saliency(small.model, batch, 7, checkpointing=True)
    close(result.flow, expected.flow)
    assert all("forward" not in vars(layer) for layer in small.model.get_decoder().layers)


@forms
@pytest.mark.parametrize("family", ["llava", "gemma3", "paligemma"])  # of the last two, images see ahead
def test_tiles_change_nothing(family, form, monkeypatch):
    small = tiny.build(family)
    batch = small.collate(seen(small))
    expected = saliency(small.model, batch, 7, form=form, record=[2])
    monkeypatch.setattr("vlmflow.flow.saliency._TILE_BUDGET", {"cpu": 5 * 3 * 4 * batch["input_ids"].shape[1]})
    result = saliency(small.model, batch, 7, form=form, record=[2])
    close(result.flow, expected.flow)
    close(result.maps[2], expected.maps[2])


class Largest(TorchDispatchMode):
    """How many elements the largest tensor has that an operation gave."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


@forms
@pytest.mark.parametrize(("attn", "whole"), [("sdpa", False), ("eager", True)])
def test_memory_is_linear_in_the_prompt(attn, whole, form, monkeypatch):
    """No tensor holds all heads' attention of the prompt, unless the model's own kernel makes one."""
    budget = 1 << 20
    monkeypatch.setattr("vlmflow.flow.saliency._LARGE_TILE_BUDGET", budget)  # or a GPU would need a longer prompt
    small = tiny.build("llava", attn)
    batch = small.collate([small.sample([5, "image", 1000]), small.sample([5, "image", 900])])
    attention = 4 * batch["input_ids"].shape[1] ** 2
    assert attention > 4 * budget
    with Largest() as largest:
        saliency(small.model, batch, 7, form=form)
    assert (largest.elements >= attention) == whole


def test_loss_scale_cancels():
    small = tiny.build("llava")
    sample = small.samples[1]
    expected, result = (saliency(small.model, sample, 7, record=[1], loss_scale=scale) for scale in (1.0, 1024.0))
    assert torch.equal(result.flow, expected.flow)
    assert torch.equal(result.loss, expected.loss)


def n_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_leaves_nothing_behind():
    """Weights stay trainable or not, as they were; no gradient, hook or stand-in stays; also after an error."""
    small = tiny.build("llava")
    model = copy.deepcopy(small.model)
    model.model.vision_tower.requires_grad_(False)
    before = [weight.requires_grad for weight in model.parameters()]
    hooks = n_hooks(model)
    with torch.inference_mode():
        inside = saliency(model, small.samples[0], 7)
    assert torch.equal(inside.flow, saliency(model, small.samples[0], 7).flow)
    assert not inside.flow.requires_grad
    assert not inside.loss.requires_grad
    with pytest.raises(ValueError, match="has no image"):
        saliency(model, small.sample([6]), 7, checkpointing=True)
    assert [weight.requires_grad for weight in model.parameters()] == before
    assert all(weight.grad is None for weight in model.parameters())
    assert n_hooks(model) == hooks
    assert all("forward" not in vars(layer) for layer in model.get_decoder().layers)
    with prune(model, HiMAP(2, 0.5, 4, 0.5)), torch.no_grad():
        model(**small.samples[0])


def test_released_form_is_another_quantity():
    """The released script multiplies by A once more, and takes absolute values before the heads cancel."""
    small = tiny.build("llava")
    paper, released = (saliency(small.model, small.samples[0], 7, form=form) for form in ("paper", "released"))
    assert not torch.allclose(paper.blocks / paper.blocks.sum(), released.blocks / released.blocks.sum(), rtol=0.1)
    assert (released.blocks < paper.blocks.sum()).all()
    # its rows say what a segment receives: system tokens see nothing but themselves
    assert (released.blocks[:, :, 0, 1:] == 0).all()


def test_released_form_sums_rows_and_totals():
    """Its measures say what a segment receives, and its flows are not per image token."""
    small = tiny.build("llava")
    found = saliency(small.model, small.samples[0], 7, form="released")
    system, image, instruction = range(3)
    counts = [len(found.layout.positions(segment)[0]) for segment in ("system", "image", "instruction")]
    for segment, measure in ((system, found.s_sys), (image, found.s_img), (instruction, found.s_ins)):
        torch.testing.assert_close(measure, found.blocks[:, :, segment].sum(-1) / counts[segment])
    torch.testing.assert_close(found.s_vv, found.blocks[:, :, image, image])
    torch.testing.assert_close(found.s_vt, found.blocks[:, :, instruction, image])


def test_equation_6_as_printed_is_empty():
    """i in V, j in I is flow from the instruction into the image, which comes before it."""
    small = tiny.build("llava")
    found = saliency(small.model, small.samples[0], 7)
    _, image, instruction = range(3)
    assert (found.blocks[:, :, image, instruction] == 0).all()
    assert (found.blocks[:, :, instruction, image] > 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": []}, "target has 0 answers for a batch of 2; give one for each sample"),
        ({"target": [[5], []]}, "the answer of sample 1 has no token"),
        ({"target": [5, 128]}, "the answer of sample 1 has token 128, outside the vocabulary of 128"),
        ({"target": -100}, "has token -100, outside the vocabulary"),
        ({"target": "3"}, "target must be token ids, got the text '3'; take those of likeliest\\(spellings\\("),
        ({"target": ["A", "B"]}, "target must be token ids, got the text 'A'"),
        ({"target": [[5], ["6"]]}, "target must be token ids, got the text '6'"),
        ({"form": "squared"}, "form must be 'paper' or 'released', got 'squared'"),
        ({"over": "last"}, "over must be 'first' or 'mean', got 'last'"),
        ({"record": [6]}, "record names layer 6, but this model has layers 0 to 5"),
    ],
)
def test_bad_settings_are_refused(change, message, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # its own check would come first
    small = tiny.build("llava")
    settings = {"model": small.model, "inputs": small.collate(small.samples[:2]), "target": 7} | change
    with pytest.raises(ValueError, match=message):
        saliency(**settings)


def test_patches_of_an_unknown_segment_are_refused():
    small = tiny.build("llava")
    found = saliency(small.model, small.samples[0], 7)
    with pytest.raises(ValueError, match="into must be one of system, image, instruction, got 'text'"):
        found.patches(0, into="text")


def test_bad_inputs_are_refused():
    small = tiny.build("llava")
    batch = small.collate(small.samples[:2])
    without = small.collate([small.samples[0], small.sample([6])])
    with pytest.raises(ValueError, match="sample 1 has no image token; saliency follows visual information"):
        saliency(small.model, without, 7)
    with pytest.raises(ValueError, match="sample 0 has no instruction token; put the question behind the image"):
        saliency(small.model, small.sample([4, "image"]), 7)
    right = {key: value.flip(1) if value.dim() == 2 else value for key, value in batch.items()}
    with pytest.raises(ValueError, match="padded on the right; pad on the left"):
        saliency(small.model, right, 7)
    with pytest.raises(ValueError, match="hold no input_ids"):
        saliency(small.model, {"inputs_embeds": torch.zeros(1, 4, 64)}, 7)
    position_ids = torch.arange(batch["input_ids"].shape[1]).expand(2, -1)
    with pytest.raises(ValueError, match="leave position_ids out"):
        saliency(small.model, {**batch, "position_ids": position_ids}, [[5, 6], [7]], over="mean")
    training = copy.deepcopy(small.model).train()
    with pytest.raises(ValueError, match="the model is in training mode, where dropout would blur it"):
        saliency(training, batch, 7)


def test_lets_go_of_q_k_and_v_on_the_way_back(monkeypatch):
    """By reference count alone: when a layer's gradient comes, those of layers behind it are gone."""
    small, held, alive = tiny.build("llava"), {}, {}
    run, sum_up = Collector.__call__, Collector._backward

    def noted(self, call):
        held[call.layer] = [weakref.ref(x) for x in (call.kernel.query, call.kernel.key, call.kernel.value)]
        return run(self, call)

    def counted(self, waiting, gradient):
        layer = waiting[0].layer
        alive[layer] = [n for n, refs in held.items() if n > layer + 1 and any(ref() is not None for ref in refs)]
        sum_up(self, waiting, gradient)

    monkeypatch.setattr(Collector, "__call__", noted)
    monkeypatch.setattr(Collector, "_backward", counted)
    gc.disable()
    try:
        saliency(small.model, small.samples[0], 7)
    finally:
        gc.enable()
    assert alive == {layer: [] for layer in range(LAYERS)}


def test_answers_are_spelled_as_the_model_writes_them():
    """A tokenizer in the manner of SentencePiece: a word's first piece carries the space before it."""

    class Words:
        ids = {":": 1, "A": 2, " A": 3, "Q": 4, " B": 5}  # noqa: RUF012

        def encode(self, text, *, add_special_tokens):
            found = []
            while text:
                piece = max((piece for piece in self.ids if text.startswith(piece)), key=len)
                found.append(self.ids[piece])
                text = text[len(piece) :]
            return found

    assert spellings(Words(), "Q:", "A") == [(3,), (2,)]
    logits = torch.zeros(6)
    assert likeliest(spellings(Words(), "Q:", "A"), logits) == (3,)
    logits[2] = 1.0
    assert likeliest(spellings(Words(), "Q:", "A"), logits) == (2,)
    with pytest.raises(ValueError, match="token 9 is outside the vocabulary of 6"):
        likeliest([(3,), (9,)], logits)
    with pytest.raises(ValueError, match="no token spells ''"):
        spellings(Words(), "Q:", "")


def test_extending_without_a_mask():
    ids = torch.tensor([[5, 100, 6], [7, 100, 8]])
    extended = extend({"input_ids": ids, "mm_token_type_ids": (ids == 100).long()}, [(3, 4, 5), (6,)], 0)
    assert extended["input_ids"].tolist() == [[5, 100, 6, 3, 4], [7, 100, 8, 6, 6]]
    assert extended["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert extended["mm_token_type_ids"].tolist() == [[0, 1, 0, 0, 0]] * 2
    assert extend({"input_ids": ids}, [(3, 4), (5, 6)], 1)["token_type_ids"].tolist() == [[0, 0, 0, 1]] * 2
