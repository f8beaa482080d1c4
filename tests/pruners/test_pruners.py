"""What each method asks for, and what it refuses."""

import math
from dataclasses import dataclass

import pytest
import torch

import tiny
from vlmflow import PRUNERS, VTW, FastV, HiMAP, Pruner, PyramidDrop, Random, Stage, Uniform, make_pruner, prune
from vlmflow.pruners import kept_after


def test_himap_as_in_the_paper():
    """576 -> 288 -> 72 before layers 2 and 8 of 32."""
    assert HiMAP().schedule(32, 576) == (576,) * 2 + (288,) * 6 + (72,) * 24


@pytest.mark.parametrize(
    ("task", "n_layers", "k1", "k2"),
    [
        ("qa", 32, 2, 8),
        ("caption", 32, 2, 15),
        ("qa", 40, 3, 8),
        ("caption", 40, 3, 15),
        ("qa", 28, 2, 7),
        ("qa", 10, 1, 3),
    ],
)
def test_himap_presets(task, n_layers, k1, k2):
    """Table 3 at 32 and 40 layers, in proportion elsewhere."""
    assert HiMAP.preset(task, n_layers) == HiMAP(k1, 0.5, k2, 0.75)


@pytest.mark.parametrize("n_layers", range(3, 80))
def test_presets_fit_every_depth(n_layers):
    for task in ("qa", "caption"):
        HiMAP.preset(task, n_layers).checked_stages(n_layers, 576)
    for cls in PRUNERS.values():
        cls.scaled(n_layers).checked_stages(n_layers, 576)


@pytest.mark.parametrize("task", ["qa", "caption"])
@pytest.mark.parametrize("n_layers", [10, 28, 32, 40])
@pytest.mark.parametrize("share", [0.15, 0.25, 0.5, 0.9, 1.0])
def test_himap_budget(task, n_layers, share):
    wanted = 576 * share
    schedule = HiMAP.budget(wanted, n_layers, 576, task).schedule(n_layers, 576)
    assert abs(sum(schedule) / n_layers - wanted) < 1


def test_himap_budget_contains_the_preset():
    budget = HiMAP.budget(144, 32, 576)
    assert budget.schedule(32, 576) == HiMAP().schedule(32, 576)


@pytest.mark.parametrize(
    ("pruner", "n_layers", "schedule"),
    [
        (FastV(), 4, (100, 100, 50, 50)),
        (VTW(3), 4, (100, 100, 100, 0)),
        (PyramidDrop((1, 2, 3)), 4, (100, 50, 25, 12)),
        (Random(1, 0.9), 3, (100, 10, 10)),
        (Uniform(2, 0.25), 3, (100, 100, 75)),
    ],
    ids=repr,
)
def test_schedules(pruner, n_layers, schedule):
    assert pruner.schedule(n_layers, 100) == schedule


@dataclass(frozen=True)
class Greedy(Pruner):
    """A method that drops more than there is."""

    def stages(self, n_layers, n_image):
        return (Stage(2, -1),)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HiMAP(r1=1.0), r"HiMAP: r1 must be a share in \[0, 1\), got 1.0"),
        (lambda: HiMAP(r2=-0.1), "HiMAP: r2 .* got -0.1"),
        (lambda: HiMAP(r1=math.nan), "HiMAP: r1 .* got nan"),
        (lambda: HiMAP(k1=0), "HiMAP: k1 must be a whole number of at least 1"),
        (lambda: HiMAP(k2=0), r"HiMAP: k2 must be a whole number of at least 1 \(layer 0 always .*, got 0"),
        (lambda: FastV(ratio=False), r"FastV: ratio must be a share in \[0, 1\), got False"),
        (lambda: HiMAP(k1=8, k2=8), r"HiMAP: layers must increase .* got \[8, 8\]"),
        (lambda: PyramidDrop((8, 4)), r"PyramidDrop: layers must increase .* got \[8, 4\]"),
        (lambda: Greedy().checked_stages(4, 576), r"Greedy\(\): keep must be a count of image tokens .* got -1"),
        (lambda: kept_after(576, 1.5), r"share_dropped must be in \[0, 1\], got 1.5"),
        (lambda: FastV().checked_stages(2, 576), r"FastV.*: prunes before layer 2, .* layers 1 to 1"),
        (lambda: HiMAP.preset("qa", 2), "at least 3 layers"),
        (lambda: HiMAP().fitted([False] * 8 + [True]), "too few of 9 layers attend to rank for each of its stages"),
        (lambda: HiMAP.budget(36, 32, 576), "above 36 and at most 576"),
        (lambda: HiMAP.budget(577, 32, 576), "above 36 and at most 576"),
        (lambda: make_pruner("himapp", {}, 32), "unknown pruner 'himapp'; choose from none, himap"),
        (lambda: make_pruner("fastv", {"k1": "2"}, 32), "has no field 'k1'; its fields are k, ratio"),
        (lambda: make_pruner("none", {"k": "2"}, 32), "it has no fields"),
        (lambda: make_pruner("fastv", {"k": "2.5"}, 32), "k must be a whole number, got '2.5'"),
        (lambda: make_pruner("fastv", {"ratio": "half"}, 32), "ratio must be a number, got 'half'"),
        (lambda: make_pruner("pyramiddrop", {"layers": "2;4"}, 32), "layers must be whole numbers"),
        (lambda: make_pruner("fastv", {"ratio": "2"}, 32), r"ratio must be a share in \[0, 1\), got 2.0"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_make_pruner():
    assert make_pruner("himap", {"k1": "3", "r2": "0.5"}, 32) == HiMAP(k1=3, r2=0.5)
    assert make_pruner("pyramiddrop", {"layers": "2,4,6"}, 32) == PyramidDrop((2, 4, 6))
    assert make_pruner("vtw", {}, 10) == VTW(5)


def test_records_name_method_and_fields():
    assert FastV(3).to_dict() == {"name": "fastv", "k": 3, "ratio": 0.5}


def test_a_draw_does_not_depend_on_the_batch():
    """Two samples with images of different length get the draws that they get alone."""
    small = tiny.build("llava")
    samples = [small.sample([2, "image", 4]), small.sample([2, "image", "image", 4])]
    with prune(small.model, Random(1, 0.6, seed=5)) as trace, torch.no_grad():
        small.model(**small.collate(samples))
        together = trace.kept[2]
        for sample, kept in zip(samples, together, strict=True):
            small.model(**sample)
            padding = max(s["input_ids"].shape[1] for s in samples) - sample["input_ids"].shape[1]
            assert torch.equal(trace.kept[2][0], kept - padding)


def test_seeds_draw_differently():
    small = tiny.build("llava")
    kept = []
    for seed in (0, 1):
        with prune(small.model, Random(1, 0.5, seed=seed)) as trace, torch.no_grad():
            small.model(**small.samples[0])
            kept.append(trace.kept[2][0].tolist())
    assert kept[0] != kept[1]


def test_uniform_is_even():
    small = tiny.build("llava")
    with prune(small.model, Uniform(1, 0.8)) as trace, torch.no_grad():
        small.model(**small.sample([3, "image", 4]))
    assert (trace.kept[1][0] - 3).tolist() == [2, 7, 12, 17, 22]


@dataclass(frozen=True)
class Norm(Pruner):
    """A method that someone may add: it reads hidden states, and the shape of attention, and needs no more code."""

    def stages(self, n_layers, n_image):
        return (Stage(2, n_image // 2, queries="image"),)

    def score(self, view):
        assert view.attention.shape[-1] == view.hidden.shape[1]
        torch.testing.assert_close(view.attention.mean(1).sum(1), view.received)
        return view.hidden.norm(dim=-1)


def test_a_method_of_ones_own():
    small = tiny.build("llava")
    states = []

    def note(module, args, output):
        states.append(output)

    handle = small.model.model.language_model.layers[1].register_forward_hook(note)
    batch = small.collate(small.samples)
    with prune(small.model, Norm()) as trace, torch.no_grad():
        small.model(**batch)
    handle.remove()
    for sample, image in enumerate(trace.layout.positions("image")):
        order = states[0][sample, image].norm(dim=-1).argsort(descending=True)
        assert trace.kept[2][sample].tolist() == sorted(image[order[: len(image) // 2]].tolist())


def test_attention_without_queries_is_refused():
    @dataclass(frozen=True)
    class Blind(Pruner):
        def stages(self, n_layers, n_image):
            return (Stage(2, 1),)

    small = tiny.build("llava")
    with prune(small.model, Blind()), pytest.raises(ValueError, match="names no queries"):
        small.model(**small.samples[0])
