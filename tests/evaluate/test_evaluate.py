"""Evaluations: rows on disk that survive anything, equal budgets, tables of many results."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from vlmflow.cli import app
from vlmflow.cli.progress import bars, show
from vlmflow.evaluate import runner
from vlmflow.evaluate.budgets import for_task, with_budget
from vlmflow.evaluate.evaluation import Evaluation
from vlmflow.evaluate.judge import Judge, Verdict, mark
from vlmflow.evaluate.model_facts import ModelFacts, fingerprint
from vlmflow.evaluate.rows import Row, outcomes_of, rows_of
from vlmflow.evaluate.runner import run
from vlmflow.evaluate.tables import Result, find_results, group_grid, report
from vlmflow.figures import comparison
from vlmflow.flow.contributions import ByLayer
from vlmflow.flow.study import Study
from vlmflow.models import VLM, load
from vlmflow.pico import samples as pico_samples
from vlmflow.pruners import PRUNERS, VTW, FastV, HiMAP, Unpruned
from vlmflow.records.files import RecordError
from vlmflow.records.folder import Folder, claim
from vlmflow.records.schema import EvaluationCounts, EvaluationSummary
from vlmflow.tasks import TASKS, Picture, Sample, Source, TaskError

SCENES = pico_samples()
METHODS = [name for name in PRUNERS if name != "none"]


@pytest.fixture(scope="module")
def vlm():
    return load("pico", device="cpu")


@pytest.fixture
def questions(tmp_path):
    """Six questions of uneven length about four scenes; the third one's image can be broken."""
    lines = []
    for number in range(6):
        scene = SCENES[number % 4]
        question = scene.questions[number % len(scene.questions)]
        name = f"{number}.png"
        Image.open(scene.image).save(tmp_path / name)
        lines.append({"image": name, "question": question.text, "answer": list(question.answers), "id": f"q{number}"})
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def evaluation(file: Path, **changes) -> Evaluation:
    """The questions under himap."""
    made = Evaluation(TASKS["jsonl"], HiMAP(k1=1, k2=3), source=Source(file), max_new_tokens=6)
    return replace(made, **changes)


def files(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "summary.json").read_bytes(), (folder / "rows.jsonl").read_bytes()


# -- rows


def test_a_row_says_what_was_asked_answered_and_paid(vlm, questions, tmp_path):
    summary = run(vlm, evaluation(questions), tmp_path / "out", batch_size=4)
    rows = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"q{i}" for i in range(6)]
    first = rows[0]
    assert first["prompt"] == SCENES[0].questions[0].text
    assert first["image_tokens"] == {"0": 576, "1": 288, "3": 72}
    assert first["cost"]["mean_image_tokens"] == (576 + 2 * 288 + 7 * 72) / 10
    assert 0 < first["cost"]["shares"]["paper_flops"] < first["cost"]["shares"]["exact_flops"] < 1
    assert first["answer"] == first["parsed"]
    assert summary["samples"] == {"asked": 6, "answered": 6, "failed": 0}
    assert summary["image_tokens"] == [576, 288, 288, *[72] * 7]
    assert summary["cost"]["samples"] == 6
    assert summary["metric"]["value"] == pytest.approx(100 * sum(row["score"] for row in rows) / 6)
    assert summary["settings"] == Folder(tmp_path / "out").settings()
    assert summary["settings"]["pruner"] == {"name": "himap", "k1": 1, "r1": 0.5, "k2": 3, "r2": 0.75}


def test_batches_change_no_row(vlm, questions, tmp_path):
    for size in (1, 4):
        run(vlm, evaluation(questions), tmp_path / str(size), batch_size=size)
    assert files(tmp_path / "1") == files(tmp_path / "4")


def test_a_model_that_memory_cannot_hold_gives_the_same_files(vlm, questions, tmp_path, monkeypatch):
    """What ``device="auto"`` leaves on disk is fetched layer by layer; the fingerprint reads it there."""
    scarce = partial(
        AutoModelForImageTextToText.from_pretrained,
        max_memory={"cpu": 8_000_000},
        offload_folder=tmp_path / "offloaded",
    )
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", scarce)
    spread = load("pico", device="auto")
    weights = [(weight.is_meta, weight.device.type) for weight in spread.model.parameters()]
    assert {meta for meta, _ in weights} == {True, False}
    assert ModelFacts.of(spread) == ModelFacts.of(vlm)
    run(vlm, evaluation(questions), tmp_path / "whole", batch_size=4)
    run(spread, evaluation(questions), tmp_path / "spread", batch_size=4)
    assert files(tmp_path / "whole") == files(tmp_path / "spread")


def test_a_batch_that_fails_as_a_whole_is_asked_one_by_one(vlm, questions, tmp_path, monkeypatch):
    run(vlm, evaluation(questions), tmp_path / "whole", batch_size=1)
    generate = VLM.generate

    def scarce(self, inputs, max_new_tokens):
        if inputs["input_ids"].shape[0] > 1:
            raise RuntimeError("out of memory\nand so on")
        return generate(self, inputs, max_new_tokens)

    monkeypatch.setattr(VLM, "generate", scarce)
    run(vlm, evaluation(questions), tmp_path / "scarce", batch_size=3)
    assert files(tmp_path / "whole") == files(tmp_path / "scarce")


def test_a_broken_image_fails_alone_and_is_asked_again_later(vlm, questions, tmp_path):
    image = tmp_path / "2.png"
    intact = image.read_bytes()
    image.write_bytes(intact[:300])
    seen = []
    summary = run(vlm, evaluation(questions), tmp_path / "out", batch_size=3, progress=lambda *now: seen.append(now))
    assert summary["samples"] == {"asked": 6, "answered": 5, "failed": 1}
    assert summary["failed"] == {"q2": "ImageError: 2.png is broken (image file is truncated); get an intact copy"}
    assert summary["metric"]["n"] == 5
    assert seen[0] == (0, 6, None)
    assert [row.sample.id for _, _, row in seen if row and row.failure] == ["q2"]
    image.write_bytes(intact)

    def stop(done, total, row):
        assert not (tmp_path / "out/summary.json").exists() or row is None
        if row is not None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(vlm, evaluation(questions), tmp_path / "out", batch_size=3, progress=stop)
    assert not (tmp_path / "out/summary.json").exists()
    assert run(vlm, evaluation(questions), tmp_path / "out", batch_size=3)["samples"]["failed"] == 0
    run(vlm, evaluation(questions), tmp_path / "intact", batch_size=3)
    assert files(tmp_path / "out") == files(tmp_path / "intact")


def test_when_all_fail_something_else_is_wrong(vlm, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "FAILURES_IN_A_ROW", 4)
    for number in range(6):
        (tmp_path / f"{number}.png").write_text("no image")
    with pytest.raises(RecordError, match=r"4 samples in a row failed .*is no image.*the rows so far are in"):
        run(vlm, evaluation(questions), tmp_path / "out", batch_size=2)
    assert len(rows_of(Folder(tmp_path / "out")).read()) == 4
    monkeypatch.setattr(runner, "FAILURES_IN_A_ROW", 50)
    summary = run(vlm, evaluation(questions), tmp_path / "out", batch_size=2)
    assert summary["samples"]["failed"] == 6
    assert summary["metric"] is None


# -- going on


@pytest.fixture
def finished(vlm, questions, tmp_path):
    run(vlm, evaluation(questions), tmp_path / "finished", batch_size=2)
    return tmp_path / "finished"


def test_a_killed_run_ends_with_the_same_files(vlm, tmp_path):
    command = ["eval", "--task", "pico", "--limit", "8", "--batch-size", "2", "--max-new-tokens", "4"]
    out = tmp_path / "killed"
    rows = out / "rows.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "vlmflow", *command, "--device", "cpu", "--out", str(out)],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    while process.poll() is None and (not rows.exists() or rows.read_bytes().count(b"\n") < 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "summary.json").exists()
    with rows.open("ab") as file:  # in the middle of a line
        file.write(b'{"id": "held_out/0/exist_ad')
    himap, origin = for_task("himap", {}, "qa", vlm.n_layers)
    asked = Evaluation(TASKS["pico"], himap, origin, limit=8, max_new_tokens=4)
    began = []
    run(vlm, asked, out, batch_size=2, progress=lambda done, total, row: began.append(done))
    assert 2 <= began[0] < 8
    run(vlm, asked, tmp_path / "whole", batch_size=2)
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_cut_row_is_written_again(vlm, questions, finished, share):
    before = files(finished)
    rows = finished / "rows.jsonl"
    rows.write_bytes(before[1][: int(share * len(before[1]))])
    (finished / "summary.json").unlink()
    run(vlm, evaluation(questions), finished, batch_size=2)
    assert files(finished) == before


def test_a_finished_run_asks_nothing(vlm, questions, finished, monkeypatch):
    before = files(finished)
    monkeypatch.setattr(VLM, "generate", None)
    run(vlm, evaluation(questions), finished)
    assert files(finished) == before


def test_a_run_goes_on_under_another_name_of_its_prompt(vlm, questions, finished):
    """Its texts are the same, as the samples' digest says; the folder keeps the name that it began with."""
    before = files(finished)
    for name in ("settings.json", "summary.json"):
        (finished / name).write_text((finished / name).read_text().replace('"prompt": "plain"', '"prompt": "paper"'))
    renamed = files(finished)
    assert renamed != before
    run(vlm, evaluation(questions), finished)
    assert files(finished) == renamed


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"limit": 5}, 'samples.count was 6, is 5; samples.sha256 was ".*; limit was null, is 5'),
        ({"pruner": FastV(k=1)}, 'pruner.name was "himap", is "fastv"'),
        ({"pruner": HiMAP(k1=1, k2=4)}, r"settings: pruner.k2 was 3, is 4\. Take another folder"),
        ({"prompt": "llava"}, 'samples.sha256 was ".*; prompt was "plain", is "llava"'),
        ({"max_new_tokens": 7}, "max_new_tokens was 6, is 7"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(vlm, questions, finished, changes, says):
    before = files(finished)
    with pytest.raises(RecordError, match=says):
        run(vlm, evaluation(questions, **changes), finished)
    assert files(finished) == before


def test_changed_data_and_weights_are_other_settings(vlm, questions):
    asked = evaluation(questions)
    before = asked.settings(ModelFacts.of(vlm), asked.samples())
    questions.write_text(questions.read_text().replace(SCENES[0].questions[0].text, "What is this?"))
    assert asked.settings(ModelFacts.of(vlm), asked.samples())["samples"] != before["samples"]
    other = load("pico", device="cpu")
    other.model.lm_head.weight.data[0, 0] += 1e-3
    assert fingerprint(other.model) != before["weights"]


def test_exchanged_pictures_are_not_summed_up_together(vlm, questions, finished, tmp_path):
    before = files(finished)
    (tmp_path / "3.png").write_bytes(SCENES[4].image.read_bytes())
    with pytest.raises(RecordError, match=r"answers about other images than those of 1 samples now \(q3\); put the im"):
        run(vlm, evaluation(questions), finished)
    assert files(finished) == before
    (finished / "pictures.json").unlink()  # as an older version left it
    run(vlm, evaluation(questions), finished)
    assert files(finished) == before


def test_a_folder_of_an_older_version_goes_on(vlm, questions, finished):
    """Its settings have no commit."""
    settings = Folder(finished).settings()
    assert settings.pop("commit") is None
    (finished / "settings.json").write_text(json.dumps(settings))
    assert run(vlm, evaluation(questions), finished)["settings"] == settings


def test_two_processes_do_not_share_a_folder(tmp_path):
    with claim(tmp_path / "out", {"a": 1}), pytest.raises(RecordError, match="another process is writing"):
        claim(tmp_path / "out", {"a": 1}).__enter__()
    with claim(tmp_path / "out", {"a": 1}):
        pass


def test_broken_folders_are_refused(vlm, questions, finished, tmp_path):
    rows = finished / "rows.jsonl"
    rows.write_bytes(b"nonsense\n" + rows.read_bytes())
    with pytest.raises(RecordError, match=r"rows.jsonl, line 1: not a row"):
        run(vlm, evaluation(questions), finished)
    (finished / "settings.json").unlink()
    with pytest.raises(RecordError, match=r"has rows.jsonl but no settings.json"):
        run(vlm, evaluation(questions), finished)
    with pytest.raises(RecordError, match="need a folder"):
        run(vlm, evaluation(questions), questions)


def test_marks_come_after_the_answers_and_are_kept(vlm, questions, tmp_path, monkeypatch):
    (tmp_path / "mm-vet.json").write_text(
        json.dumps(
            {
                f"v1_{i}": {
                    "imagename": f"{i}.png",
                    "question": "What is it?",
                    "answer": "a cat",
                    "capability": ["rec"],
                }
                for i in range(3)
            }
        )
    )
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / f"{number}.png").rename(tmp_path / f"images/{number}.png")
    asked = Evaluation(TASKS["mmvet"], Unpruned(), source=Source(tmp_path), max_new_tokens=3)
    samples = asked.samples()
    unmarked = run(vlm, asked, tmp_path / "out", batch_size=3)
    assert (unmarked["metric"]["value"], unmarked["metric"]["excluded"]) == (None, 3)

    def verdicts(self, rubric, answers):
        for (sample, _), marks in zip(answers, [(1.0,), (0.5,), None], strict=True):
            yield Verdict(sample.id, marks, "said", None if marks else "HTTP 500", "judge-1", 1)

    monkeypatch.setattr(Judge, "mark", verdicts)
    marked = mark(tmp_path / "out", asked, Judge("judge"), samples)
    assert (marked["metric"]["value"], marked["metric"]["n"], marked["metric"]["excluded"]) == (75.0, 2, 1)
    assert marked["judge"]["model"] == "judge"
    assert run(vlm, asked, tmp_path / "out") == marked
    with pytest.raises(TaskError, match="needs no judge"):
        mark(tmp_path / "out", evaluation(questions), Judge("judge"), samples)


# -- budgets


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("n_layers", [10, 28, 32, 40])
@pytest.mark.parametrize("share", [0.75, 0.5, 0.33, 0.2])
def test_every_method_reaches_a_budget(name, n_layers, share):
    method = with_budget(name, share, n_layers)
    tolerance = 0.5 / n_layers + 1e-9 if name == "vtw" else 1e-4
    assert method.mean_share(n_layers) == pytest.approx(share, abs=tolerance)
    assert method.mean_share(n_layers, 576) == pytest.approx(share, abs=max(tolerance, 1.5 / 576))


RECORDED = [json.loads(line) for line in (Path(__file__).parents[1] / "data/budgets.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("name", "n_layers", "preset", "share", "fields"), RECORDED)
def test_budgets_stay_what_they_were(name, n_layers, preset, share, fields):
    """What each method was set to, or why not, when budgets were a closed form a method (0.1.0)."""
    if isinstance(fields, str):
        with pytest.raises(ValueError, match=f"^{re.escape(fields)}$"):
            with_budget(name, share, n_layers, preset)
        return
    found = json.loads(json.dumps(with_budget(name, share, n_layers, preset).to_dict()))
    shares = {field for field, value in fields.items() if isinstance(value, float)}
    assert {field: found[field] for field in found.keys() - shares} == {
        field: fields[field] for field in fields.keys() - shares
    }
    assert {field: found[field] for field in shares} == pytest.approx(
        {field: fields[field] for field in shares}, abs=1e-9
    )


def test_budgets_move_layers_only_where_they_must():
    assert with_budget("fastv", 0.5, 32).to_dict() | {"ratio": 0} == {"name": "fastv", "k": 2, "ratio": 0}
    assert with_budget("fastv", 0.2, 10).to_dict()["k"] == 1
    assert with_budget("pyramiddrop", 0.2, 10).to_dict()["layers"] == (1, 4, 6)
    assert with_budget("vtw", 0.34, 32) == VTW(k=11)
    assert with_budget("himap", 0.34, 32, "caption").to_dict()["k2"] == 15


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("himap", 0.1, 10), "himap cannot give a mean of 10.0% .* first 1 of 10 layers see them all"),
        (("fastv", 0.05, 10), "fastv cannot give a mean of 5.0%"),
        (("none", 0.5, 10), "a budget needs one of"),
        (("fastv", 1.0, 10), "above 0 and below 1"),
    ],
)
def test_what_no_budget_can_be_is_refused(args, says):
    with pytest.raises(ValueError, match=says):
        with_budget(*args)


def test_himap_takes_the_tasks_preset_and_fields_over_it():
    assert for_task("himap", {}, "caption", 32) == (HiMAP(k1=2, k2=15), "Table 3's caption preset")
    method, origin = for_task("himap", {"r1": "0.3"}, "caption", 32)
    assert method == HiMAP(k1=2, r1=0.3, k2=15)
    assert origin == "Table 3's caption preset; set: r1=0.3"
    assert for_task("fastv", {"k": "3"}, "qa", 32)[0] == FastV(k=3)


# -- the command line


def vlmflow(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_eval_prints_a_table_and_a_record(questions, tmp_path):
    args = ["eval", "--task", "jsonl", "--source", questions, "--limit", "2", "--max-new-tokens", "4"]
    made = vlmflow(*args, "--out", tmp_path / "out", "--set", "r1=0.25", "--json")
    assert made.exit_code == 0, made.output
    summary = json.loads(made.stdout)
    assert summary == json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["settings"]["pruner"] == {"name": "himap", "k1": 1, "r1": 0.25, "k2": 3, "r2": 0.75}
    assert summary["settings"]["pruner_from"] == "Table 3's qa preset; set: r1=0.25"
    assert "accuracy" in made.stdout
    refused = vlmflow(*args, "--out", tmp_path / "out", "--pruner", "vtw")
    assert refused.exit_code == 2
    assert refused.stdout == ""
    assert len(refused.stderr.strip().split("\n")) == 1
    assert 'pruner.name was "himap", is "vtw"' in refused.stderr
    assert json.loads((tmp_path / "out/summary.json").read_text()) == summary


@pytest.mark.parametrize(("each", "pace"), [(3.0, "3.0 s each, 0:00:12 left"), (0.25, "4.0 a second, 0:00:01 left")])
def test_the_progress_tells_rate_time_left_and_failures(monkeypatch, capsys, each, pace):
    """The rate is this run's: what an earlier one did took no time."""
    seconds = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: seconds[0])
    monkeypatch.setenv("COLUMNS", "100")
    for failure in (None, "OSError: [broken] image"):
        with bars() as progress:
            follow = show(progress, "pico himap")
            follow(4, 10, None)
            for done, why in ((5, None), (6, failure)):
                seconds[0] += each
                follow(done, 10, Row(Sample(f"q{done}", ()), "", failure=why))
        *above, last = capsys.readouterr().err.strip().split("\n")
        assert above == ([f"q6 failed: {failure}"] if failure else [])
        assert last.startswith("pico himap ")
        assert last.rstrip().endswith(f" 6/10 {pace}, 1 failed" if failure else f" 6/10 {pace}")


def test_a_sweep_tells_the_parts_of_a_benchmark_apart(tmp_path):
    args = ["--task", "pico", "--limit", "4", "--pruners", "vtw", "--budgets", "0.5", "--out", tmp_path]
    assert vlmflow("sweep", *args).exit_code == 0
    outcomes = {name: outcomes_of(Folder(tmp_path / name)) for name in ("none", "vtw-0.5")}
    table = (tmp_path / "sweep.md").read_text().partition("by part**")[2]
    assert "|  | images | none | vtw-0.5 |" in table
    alone = {0.0: "0.0 [0.0, 79.3]", 1.0: "100.0 [20.7, 100.0]"}  # Wilson's of one question
    for number, kind in enumerate(outcome.sample.group for outcome in outcomes["none"]):
        assert f"| {kind} | 1 | " + " | ".join(alone[own[number].score] for own in outcomes.values()) + " |" in table
    assert "- pico: 1 image, too few to trust intervals (under 20)" in (tmp_path / "sweep.md").read_text()


def test_the_parts_of_captions_are_scored_as_parts_of_the_whole(tmp_path):
    """A part's own document frequencies would give other figures than the summary's."""
    task, texts = TASKS["nocaps"], ["a dog runs on grass", "two cats sleep", "a red bus in town", "a man on a horse"]
    rows, groups = [], ["in", "in", "out", "out"]
    for number, (text, said) in enumerate(zip(texts, [texts[0], "two cats", "a bus in town", "a horse"], strict=True)):
        sample = Sample(str(number), (Picture(str(number), b""),), references=(text,), group=groups[number])
        rows.append(Row(sample, "", answer=said, parsed=said, image_tokens={0: 1}))
    rows_of(Folder(tmp_path)).append(rows)
    metric = task.metric(outcomes_of(Folder(tmp_path)))
    counts = EvaluationCounts(asked=4, answered=4, failed=0)
    summary = EvaluationSummary({"task": "nocaps", "seed": 0}, None, None, counts, {}, None, None, [], None)
    grid = group_grid([("none", Result(tmp_path, summary))], "parts")
    assert grid is not None
    for group, _, cell in grid.rows:
        value, low, high = (float(number) for number in re.findall(r"[\d.]+", cell))
        assert value == pytest.approx(metric["groups"][group], abs=0.051)
        assert low <= value <= high
    assert [(group, images) for group, images, _ in grid.rows] == [("in", 2), ("out", 2)]
    alone = task.metric([row.outcome() for row in rows[2:]])["value"]
    assert abs(alone - metric["groups"]["out"]) > 1
    none = Result(tmp_path / "nothing", summary)
    both = group_grid([("none", Result(tmp_path, summary)), ("himap", none)], "parts")
    assert both is not None
    assert [cells[3] for cells in both.rows] == ["-", "-"]


def test_sweep_and_report(questions, tmp_path):
    task = ["--task", "jsonl", "--source", questions, "--limit", "4", "--max-new-tokens", "4", "--batch-size", "4"]
    swept = vlmflow("sweep", *task, "--pruners", "himap,vtw", "--budgets", "0.5,0.1", "--out", tmp_path / "s", "--json")
    assert swept.exit_code == 0, swept.output
    assert "himap cannot give a mean of 10.0%" in swept.stderr
    lines = json.loads(swept.stdout)["lines"]
    assert [(line["method"], line["budget"]) for line in lines] == [
        ("none", None),
        ("himap", 0.5),
        ("himap", 0.1),
        ("vtw", 0.5),
        ("vtw", 0.1),
    ]
    none, himap, refused, vtw, _ = lines
    assert himap["mean_image_tokens"] == pytest.approx(288, abs=1)
    assert vtw["mean_image_tokens"] == 288
    assert himap["eq10_share"] < himap["exact_share"] < none["exact_share"] == 1
    assert himap["difference"] == pytest.approx(himap["value"] - none["value"])
    assert refused["value"] is None
    table = (tmp_path / "s/sweep.md").read_text()
    assert "| himap | 50% |" in table
    assert "Eq. 10: the paper's FLOPs" in table
    assert (tmp_path / "s/sweep.csv").read_text().count("\n") == 6
    with Image.open(tmp_path / "s/pareto.png") as picture:
        picture.load()
    before = {path: path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file()}
    again = vlmflow("sweep", *task, "--pruners", "himap,vtw", "--budgets", "0.5,0.1", "--out", tmp_path / "s")
    assert again.exit_code == 0, again.output
    assert {path: path.read_bytes() for path in before} == before

    (tmp_path / "s/vtw-0.1/summary.json").unlink()
    told = vlmflow("report", tmp_path / "s", "--out", tmp_path / "r", "--json")
    assert told.exit_code == 0, told.output
    assert "not finished" in told.stderr
    record = json.loads(told.stdout)
    assert [line["method"] for line in record["lines"]] == ["himap", "none", "vtw"]
    by_method = {line["method"]: line for line in record["lines"]}
    assert by_method["himap"]["difference"] == himap["difference"]
    made = (tmp_path / "r/report.md").read_text()
    assert made.startswith("**Table 1")
    assert all("4 images, too few to trust intervals" in said for said in (swept.stderr, table, told.stdout, made))
    first, *others = [line for line in made.split("\n") if line.startswith("| pico")]
    assert first.startswith("| pico | none |")
    assert "_" in next(line for line in others if "vtw" in line or "himap" in line)
    assert "**" in "".join([first, *others])
    assert (tmp_path / "r/report.csv").read_text().count("\n") == 4


def test_reports_leave_out_what_is_no_evaluation(vlm, questions, tmp_path):
    never = [{**json.loads(line), "answer": "atom"} for line in questions.read_text().splitlines()]
    questions.write_text("".join(json.dumps(line) + "\n" for line in never))
    run(vlm, Study(TASKS["jsonl"], ByLayer(), Source(questions), limit=1), tmp_path / "r/flow")
    only = vlmflow("report", tmp_path / "r")
    assert (only.exit_code, only.stdout) == (2, "")
    assert "no finished run of vlmflow eval or sweep to report" in only.stderr
    run(vlm, evaluation(questions, limit=1), tmp_path / "r/himap")
    told = vlmflow("report", tmp_path / "r", "--json")
    assert told.exit_code == 0, told.output
    assert "left out, as it is an experiment of vlmflow flow: " in told.stderr
    assert [line["method"] for line in json.loads(told.stdout)["lines"]] == ["himap"]


def test_an_interval_without_width_is_made_anew(vlm, questions, tmp_path):
    """As earlier versions wrote for all right."""
    summary = run(vlm, evaluation(questions, pruner=Unpruned(), limit=1), tmp_path / "out")
    value, interval = summary["metric"]["value"], summary["metric"]["interval"]
    assert interval[1] - interval[0] == pytest.approx(79.3, abs=0.1)
    summary["metric"]["interval"] = [value, value]
    (tmp_path / "out/summary.json").write_text(json.dumps(summary))
    (line,) = report(find_results([tmp_path])[0]).lines
    assert [line.low, line.high] == interval


def test_reports_keep_apart_what_differs(vlm, questions, tmp_path):
    run(vlm, evaluation(questions, pruner=Unpruned(), limit=3), tmp_path / "a/none", batch_size=3)
    run(vlm, evaluation(questions, limit=2), tmp_path / "a/himap", batch_size=3)
    made = report(find_results([tmp_path / "a"])[0])
    assert any("not compared with the unpruned run: samples.count was 3, is 2" in note for note in made.notes)
    assert all(line.difference is None for line in made.lines)
    assert "**" not in "".join(cell for row in made.grids[0].rows for cell in row)
    run(vlm, evaluation(questions, limit=1), tmp_path / "b", batch_size=3)
    with pytest.raises(
        RecordError, match=r"both himap of pico on jsonl \(samples.count was 2, is 1\); report them apart"
    ):
        report(find_results([tmp_path / "a", tmp_path / "b"])[0])


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["eval", "--task", "poetry"], "unknown task 'poetry'; choose from"),
        (["eval", "--task", "pico", "--pruner", "himapp"], "unknown pruner 'himapp'"),
        (["eval", "--task", "pico", "--set", "k1"], "--set wants field=value"),
        (["eval", "--task", "pico", "--limit", "1", "--prompt-style", "rude"], "prompt style must be one of plain"),
        (["eval", "--task", "pico", "--limit", "1", "--rule", "rude"], "answer rule must be one of"),
        (["eval", "--task", "pico", "--source", "x"], "it takes no path"),
        (["eval", "--task", "jsonl", "--source", "gone.jsonl"], "gone.jsonl: no such file"),
        (["sweep", "--task", "pico", "--budgets", "half"], "--budgets wants shares"),
        (["sweep", "--task", "pico", "--budgets", "2"], "above 0 and below 1"),
        (["sweep", "--task", "pico", "--pruners", "fast"], "unknown pruner 'fast'"),
        (["sweep", "--task", "mmvet"], "needs a judge"),
        (["sweep", "--task", "pico", "--limit", "1", "--pruners", "none"], "a sweep needs a method beside none"),
        (["eval", "--task", "pico", "--limit", "1", "--device", "toaster"], "device 'toaster'"),
        (["eval", "--task", "pico", "--engine", "rocket"], "--engine must be local or ray, got 'rocket'"),
        (["eval", "--task", "pico", "--workers", "2"], "--workers goes with --engine ray"),
        (["eval", "--task", "pico", "--limit", "1", "--engine", "ray", "--workers", "0"], "workers must be at least 1"),
        (["report", "nowhere"], "nowhere: no such folder"),
        (["report", "."], "holds no results"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_in_one_line(args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = vlmflow(*args, *([] if args[0] == "report" else ["--out", "out"]))
    assert made.exit_code == 2, made.output
    assert made.stdout == ""
    (said,) = made.stderr.strip().split("\n")
    assert says in said
    assert not Path("out").exists()


def test_what_no_other_point_beats():
    figures = ((10, 50, 45, 55), (20, 60, 55, 65), (30, 60, 55, 65))
    cheap, good, beaten = (comparison.Point(*figure) for figure in figures)
    assert [p for p in (cheap, good, beaten) if not any(comparison._beats(q, p) for q in (cheap, good, beaten))] == [
        cheap,
        good,
    ]


def test_a_setting_may_differ_in_its_last_digits(tmp_path):
    """What was solved for is not the same to the bit in every version."""
    with claim(tmp_path / "a", {"pruner": {"ratio": 0.8375000000004473}}):
        pass
    with claim(tmp_path / "a", {"pruner": {"ratio": 0.8374999999999999}}):
        pass
    with (
        pytest.raises(RecordError, match=r"pruner\.ratio was 0\.8375.*, is 0\.8376"),
        claim(tmp_path / "a", {"pruner": {"ratio": 0.8376}}),
    ):
        pass
