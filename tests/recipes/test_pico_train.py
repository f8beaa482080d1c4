"""Pico's training: loss falls within a minute, and an interrupted run ends where an unbroken one does."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from recipes.pico import export, train
from recipes.pico.curriculum import STAGES, CurriculumStage
from recipes.pico.train import HISTORY, TrainingRun, TrainingState, means, rate_share
from vlmflow.pico.scenes import CANVAS, COUNTS

ALIGN = CurriculumStage("align", 48, (1, 2), steps=6, scenes=4, part=2, muon_rate=0.03, adam_rate=1.5e-3)
TALK = CurriculumStage("talk", 48, (1, 2), steps=6, scenes=4, part=2, questions=(2, 1, 1))


@pytest.fixture
def pool():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    monkeypatch.setattr(train, "EXAM_SCENES", 2)
    monkeypatch.setattr(train, "EXAM_QUESTIONS", (4, 2, 1))


class StopAfter(threading.Event):
    """An event that sets itself once it was looked at so many times."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def is_set(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def test_a_short_training_lowers_the_loss(tmp_path, pool):
    stage = CurriculumStage("talk", 48, (1, 2), steps=25, scenes=4, part=2, questions=(6, 2, 1))
    TrainingRun(tmp_path, (stage,), pool, threading.Event()).train()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "exam" not in row]
    assert len(losses) == 25
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert {row["exam"] for row in rows if "exam" in row} == {"held_out", "new_pairs"}


def test_an_interrupted_run_ends_where_an_unbroken_one_does(tmp_path, pool):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    expected = TrainingRun(whole, (ALIGN, TALK), pool, threading.Event()).train()
    for looks in (3, 8, 2):  # in the first stage, across its end, in the second
        TrainingRun(broken, (ALIGN, TALK), pool, StopAfter(looks)).train()
    found = TrainingRun(broken, (ALIGN, TALK), pool, threading.Event()).train()
    assert (found.stage, found.step) == (expected.stage, expected.step) == (2, 0)
    assert expected.weights
    assert found.weights
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, atol=0, rtol=0)


def test_aligning_leaves_the_decoder_alone(tmp_path, pool):
    before = train.build_model(48, train.SEED).state_dict()
    after = TrainingRun(tmp_path, (ALIGN,), pool, threading.Event()).train().weights
    assert after
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not any(".layers." in name and "language_model" in name for name in moved)


def test_learning_rate_warms_up_and_falls():
    stage = CurriculumStage("x", 48, (1, 2), steps=1000, scenes=4, part=2, decay=0.4)
    assert rate_share(stage, 0) == pytest.approx(0.02)
    assert rate_share(stage, 300) == 1
    assert rate_share(stage, 800) == pytest.approx(0.5)
    assert rate_share(stage, 999) == pytest.approx(0.02)


def test_the_recipe_is_whole():
    assert STAGES[-1].canvas == CANVAS
    assert STAGES[-1].counts == COUNTS
    assert all(stage.scenes % stage.part == 0 for stage in STAGES)
    assert len({stage.name for stage in STAGES}) == len(STAGES)


def test_a_run_is_exported_as_a_folder_with_card_and_curves(tmp_path, pool):
    TrainingRun(tmp_path, (TALK,), pool, threading.Event()).train()
    export.export(tmp_path, tmp_path / "model", tmp_path / "record", (TALK,))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "All stages are complete." in card
    assert '"name": "talk"' in card
    assert {file.name for file in (tmp_path / "record").iterdir()} == {"curves.png", HISTORY}
    assert (tmp_path / "record" / "curves.png").stat().st_size > 1000
    assert isinstance(TrainingState(**torch.load(tmp_path / "checkpoint.pt")), TrainingState)


def test_a_run_goes_on_from_an_exported_folder(tmp_path, pool):
    """In the middle of a stage or after it, with its history; the weights have been through half precision."""
    stages = (ALIGN, TALK)
    for name, looks, where in (("middle", 9, (1, 2)), ("end", 99, (2, 0))):
        first = TrainingRun(tmp_path / name, stages, pool, StopAfter(looks))
        first.folder.mkdir()
        done = first.train()
        first.log({"note": "steered"})
        export.export(first.folder, tmp_path / name / "model", tmp_path / name / "record", stages)
        assert "- steered" in (tmp_path / name / "model" / "README.md").read_text()
        later = TrainingRun(tmp_path / f"{name} later", stages, pool, StopAfter(0))
        later.folder.mkdir()
        later.continue_from(tmp_path / name / "model", tmp_path / name / "record" / HISTORY)
        found = TrainingState(**torch.load(later.checkpoint))
        assert (found.stage, found.step) == where
        assert found.weights
        assert done.average
        for key, weight in done.average.items():
            if "position_embedding" not in key:
                torch.testing.assert_close(found.weights[key], weight.half().float(), atol=0, rtol=0)
        assert later.history.read_text().startswith((first.folder / "log.jsonl").read_text())


def test_means_of_reports():
    report = {"loss": 1.0, "losses": 4, "count/right": 1, "count/asked": 4}
    report |= {"naming": 3.0, "namings": 2, "object": 1.0, "color": 1.0, "place": 1.0, "centre": 1.0}
    row = means(report)
    assert (row["naming"], row["loss"], row["count"]) == (1.5, 0.25, 0.25)
