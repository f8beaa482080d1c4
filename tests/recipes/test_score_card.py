"""The embedded model's score card: which questions, what a blank picture is, how kinds are summed up."""

import json

import pytest
from typer.testing import CliRunner

from recipes.pico import score_card
from vlmflow.pico.questions import KINDS
from vlmflow.tasks import TASKS


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Of the 400 scenes that each set draws."""
    monkeypatch.setattr("vlmflow.tasks.pico.SCENES", 20)


def test_the_sets_ask_every_kind_and_blank_the_picture():
    asked = {one.title: [s for task in one.tasks for s in one.samples(task, 3)] for one in score_card.SETS}
    scenes, blanked = asked["held-out scenes"], asked["held-out questions, blank picture"]
    assert {sample.group for sample in scenes} <= set(KINDS)
    assert len(scenes) > 3 * 10
    assert len({sample.images[0].name for sample in scenes}) == 3
    assert [sample.question for sample in blanked] == [sample.question for sample in scenes]
    assert len(scenes[0].images[0].open().getcolors(1 << 20)) > 1
    assert all(len(sample.images[0].open().getcolors()) == 1 for sample in blanked)
    assert {sample.id.split("/")[0] for sample in asked["new pairs"]} == {"new_pairs"}
    assert len(asked["easy-vqa test"]) > 3


def test_kinds_and_groups_are_summed_up():
    task = TASKS["pico"]
    samples = score_card.of_first_pictures(task.samples(), 20)
    outcomes = [task.outcome(s, "yes" if s.group.startswith("exist") else s.answer) for s in samples]
    card = score_card.by_kind(task, outcomes)
    assert card["colour"]["value"] == card["multiple choice"]["value"] == 100
    exist = [s for s in samples if s.group.startswith("exist")]
    assert card["existence"]["n"] == len(exist)
    share = 100 * sum("yes" in s.references for s in exist) / len(exist)
    assert card["existence"]["value"] == pytest.approx(share, abs=0.01)
    assert card["existence"]["low"] < share < card["existence"]["high"]
    assert card["all"]["n"] == len(samples)


def test_the_command_writes_the_results_and_goes_on(tmp_path):
    args = ["--pictures", "1", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "results.json")]
    app = score_card.typer.Typer()
    app.command()(score_card.main)
    done = CliRunner().invoke(app, args, catch_exceptions=False)
    assert done.exit_code == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["sets"]["held-out scenes"]["caption"]["figure"] == "CIDEr"
    assert results["sets"]["easy-vqa test"]["all"]["n"] >= 1
    rows = (tmp_path / "work" / "held-out-scenes-pico" / "rows.jsonl").read_bytes()
    CliRunner().invoke(app, args, catch_exceptions=False)
    assert (tmp_path / "work" / "held-out-scenes-pico" / "rows.jsonl").read_bytes() == rows
    assert json.loads((tmp_path / "results.json").read_text()) == results
