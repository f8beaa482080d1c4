"""The analysis on disk: rows that survive anything, figures that show every curve, commands that refuse in one line."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from vlmflow import attach
from vlmflow.cli import app
from vlmflow.core.grids import WHOLE, Tile, whole_tiles
from vlmflow.core.images import open_image
from vlmflow.core.statistics import Interval
from vlmflow.evaluate.runner import run
from vlmflow.figures import analysis, maps
from vlmflow.flow.consistency import label_consistency, score_consistency
from vlmflow.flow.contributions import ByLayer
from vlmflow.flow.knockout import Knockout, random_positions
from vlmflow.flow.prediction import predict
from vlmflow.flow.saliency import saliency
from vlmflow.flow.study import Study, blank
from vlmflow.flow.windows import ByWindow
from vlmflow.models import VLM, Question, load
from vlmflow.pico import samples as pico_samples
from vlmflow.records.files import RecordError
from vlmflow.records.folder import RowFile
from vlmflow.records.schema import FORMAT, StudyRow, from_json, read_record, to_json
from vlmflow.tasks import TASKS, Source

SCENES = pico_samples()
COLOUR = "What color is the cat?"
MEASURES = ("label", "score")


@pytest.fixture(scope="module")
def vlm():
    return load("pico", device="cpu")


@pytest.fixture
def questions(vlm, tmp_path):
    """Four questions about three scenes: three that are never answered, and one that needs no image."""
    guess = vlm.generate(vlm.encode([Question(COLOUR, blank([open_image(SCENES[0].image)]))]), 8)[0].text
    lines = []
    for number, answer in enumerate(["atom", "bicycle", guess, "atom"]):
        scene = SCENES[number % 3]
        Image.open(scene.image).save(tmp_path / f"{number % 3}.png")
        lines.append({"image": f"{number % 3}.png", "question": COLOUR, "answer": answer, "id": f"q{number}"})
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def study(file, experiment) -> Study:
    return Study(replace(TASKS["jsonl"], max_new_tokens=8), experiment, Source(file))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("log.jsonl", ".lock")}


def vlmflow(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "100"}, catch_exceptions=False)


# -- rows


def test_saliency_rows_are_what_saliency_says(vlm, questions, tmp_path):
    summary = run(vlm, study(questions, ByLayer()), tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["q0", "q1", "q2", "q3"]
    assert [row["dropped"] for row in rows] == [False, False, True, False]
    assert rows[2]["found"] == {}
    assert summary["samples"] == {"asked": 4, "dropped": 1, "failed": 0, "kept": 3, "images": 2}
    subject = predict(vlm, Question(COLOUR, (open_image(SCENES[0].image),)), "atom")
    assert vlm.processor.tokenizer.decode([subject.target]).strip() == "atom"
    assert rows[0]["target"] == subject.target
    found = saliency(vlm.model, subject.inputs, subject.target)
    for name in ("s_sys", "s_img", "s_ins", "s_vv", "s_vt"):
        assert rows[0]["found"][name] == pytest.approx(getattr(found, name)[:, 0].tolist(), rel=1e-4)
    assert rows[0]["found"]["loss"] == pytest.approx(float(found.loss[0]), rel=1e-4)
    assert rows[0]["lengths"]["image"] == 576
    assert summary["measures"]["s_vv"][9]["value"] == 0  # nothing reads the last layer's image tokens
    assert summary["measures"]["s_vt"][3]["value"] == pytest.approx(
        np.mean([row["found"]["s_vt"][3] for row in rows if not row["dropped"]])
    )
    assert (tmp_path / "out/verdict.md").read_text().startswith("# Saliency of pico on jsonl\n\n4 samples: 1 dropped")


def test_knockout_rows_are_what_knockouts_leave(vlm, questions, tmp_path):
    summary = run(vlm, study(questions, ByWindow(layers=(2, 3, 4, 7), width=2)), tmp_path / "out")
    row = json.loads((tmp_path / "out/rows.jsonl").read_text().splitlines()[0])
    subject = predict(vlm, Question(COLOUR, (open_image(SCENES[0].image),)), "atom")
    drawn = random_positions(subject.layout, seed=0)
    expected = {
        f"{path} {','.join(map(str, layers))}": Knockout("image", target, layers)
        for path, target, layers in [
            ("visual-textual", "instruction", range(5)),
            ("visual-textual", "instruction", range(5, 10)),
            ("visual-random", drawn, range(5)),
            ("visual-random", drawn, range(5, 10)),
            ("visual-textual", "instruction", (2, 3)),
            ("intra-visual", "image", (2, 3)),
            ("visual-textual", "instruction", (4, 7)),
            ("intra-visual", "image", (4, 7)),
        ]
    }
    assert row["found"]["blocked"].keys() == expected.keys()
    for key, tap in expected.items():
        with attach(vlm.model, taps=[tap]), torch.no_grad():
            logits = vlm.model(**subject.inputs).logits[0, -1]
        kept = row["found"]["blocked"][key]
        assert kept["score"] == pytest.approx(float(score_consistency(subject.logits[None], logits[None])[0]))
        assert kept["label"] == label_consistency([int(subject.logits.argmax())], [int(logits.argmax())])[0]
        assert kept["right"] == float(int(logits.argmax()) == subject.target)
    assert min(kept["score"] for kept in row["found"]["blocked"].values()) < 1
    assert summary["settings"]["examined"] == [[2, 3], [4, 7]]
    assert summary["settings"]["ends"] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    lost = summary["lost"]["score"]["visual-textual"][1]["value"]
    rows = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    left = [one["found"]["blocked"]["visual-textual 4,7"]["score"] for one in rows if not one["dropped"]]
    assert lost == pytest.approx(1 - np.mean(left))


@pytest.mark.parametrize("experiment", [ByLayer(layers=(2, 9)), ByWindow(layers=(2, 9), width=1)], ids=lambda e: e.name)
def test_a_summary_is_read_back_as_it_was_written(vlm, questions, tmp_path, experiment):
    """By the type that wrote it, with what is not defined; so are those from before it had a format."""
    written = run(vlm, study(questions, experiment), tmp_path / "out")
    summary = read_record(experiment.summary_type, tmp_path / "out/summary.json")
    assert to_json(summary) == written
    assert written["format"] == FORMAT
    assert summary.samples.kept == 3
    wild = summary.log_vt_vv[1] if experiment.name == "saliency" else summary.log_vv_vt["score"][1]
    assert not math.isfinite(wild.value)  # of the last layer, whose image tokens nothing reads
    old = {name: value for name, value in written.items() if name != "format"}
    assert to_json(from_json(experiment.summary_type, old, "old")) == written
    with pytest.raises(RecordError, match=r"samples\.dropped of a .*Summary is wrong"):
        from_json(experiment.summary_type, written | {"samples": {"asked": 4}}, "x.json")


def test_the_control_is_drawn_from_the_seed(vlm, questions, tmp_path, monkeypatch):
    seeds = []

    def seeded(layout, seed):
        seeds.append(seed)
        return random_positions(layout, seed=seed)

    monkeypatch.setattr("vlmflow.flow.knockout.random_positions", seeded)
    run(vlm, replace(study(questions, ByWindow((9,), 1)), seed=3), tmp_path / "out")
    assert seeds == [3] * 3  # once a sample


def test_a_blank_picture_has_the_size_and_shows_nothing():
    (made,) = blank([Image.open(SCENES[0].image).resize((30, 20))])
    assert made.size == (30, 20)
    assert made.getcolors() == [(600, (224, 224, 224))]


def test_samples_are_first_asked_about_a_blank_picture(vlm, questions, tmp_path, monkeypatch):
    encoded, encode_ = [], VLM.encode
    monkeypatch.setattr(VLM, "encode", lambda self, asked: (encoded.extend(asked), encode_(self, asked))[1])
    run(vlm, study(questions, ByLayer()), tmp_path / "out", batch_size=3)
    is_blank = [len(question.images[0].getcolors(1 << 16)) == 1 for question in encoded]
    assert is_blank == [True] * 3 + [False] * 2 + [True, False]  # the third needs no image, and is dropped


# -- going on


def test_a_killed_run_ends_with_the_same_files(vlm, tmp_path):
    command = ["flow", "knockout", "--task", "easy_vqa", "--limit", "8", "--windows", "5", "--batch-size", "2"]
    out, rows = tmp_path / "killed", tmp_path / "killed/rows.jsonl"
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
        file.write(b'{"id": "test/5", "ima')
    asked, began = Study(TASKS["easy_vqa"], ByWindow(width=5), limit=8), []
    run(vlm, asked, out, batch_size=2, progress=lambda done, total, row: began.append(done))
    assert 2 <= began[0] < 8
    run(vlm, asked, tmp_path / "whole", batch_size=2)
    assert files(out) == files(tmp_path / "whole")


def test_a_finished_run_looks_at_nothing(vlm, questions, tmp_path, monkeypatch):
    run(vlm, study(questions, ByLayer((1, 2))), tmp_path / "out")
    before = files(tmp_path / "out")
    monkeypatch.setattr(VLM, "generate", None)
    run(vlm, study(questions, ByLayer((1, 2))), tmp_path / "out")
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"experiment": ByLayer((1, 3))}, r"examined was \[1, 2\], is \[1, 3\]"),
        ({"experiment": ByWindow((1, 2))}, 'experiment was "saliency", is "knockout"'),
        ({"seed": 1}, r"settings: seed was 0, is 1\. Take another folder"),
        ({"limit": 3}, "samples.count was 4, is 3"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(vlm, questions, tmp_path, change, says):
    asked = study(questions, ByLayer((1, 2)))
    run(vlm, asked, tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(RecordError, match=says):
        run(vlm, replace(asked, **change), tmp_path / "out")
    assert files(tmp_path / "out") == before


def test_a_broken_image_fails_alone_and_is_tried_again(vlm, questions, tmp_path):
    image = tmp_path / "1.png"
    intact = image.read_bytes()
    image.write_bytes(intact[:300])
    seen = []
    summary = run(
        vlm, study(questions, ByLayer()), tmp_path / "out", progress=lambda done, total, row: seen.append(row)
    )
    assert summary["failed"] == {"q1": "ImageError: 1.png is broken (image file is truncated); get an intact copy"}
    assert summary["samples"] == {"asked": 4, "dropped": 1, "failed": 1, "kept": 2, "images": 1}
    assert [row.failure is None for row in seen if row] == [True, False, True, True]
    image.write_bytes(intact)
    assert run(vlm, study(questions, ByLayer()), tmp_path / "out")["samples"]["failed"] == 0
    run(vlm, study(questions, ByLayer()), tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_when_all_fail_it_stops_and_keeps_the_rows(vlm, questions, tmp_path, monkeypatch):
    for number in range(3):
        (tmp_path / f"{number}.png").write_text("no image")
    with pytest.raises(RecordError, match=r"no sample is left: 0 of 4 .*, 4 failed \(.*is no image"):
        run(vlm, study(questions, ByLayer()), tmp_path / "out")
    assert len(RowFile(tmp_path / "out/rows.jsonl", StudyRow).read()) == 4
    monkeypatch.setattr("vlmflow.evaluate.runner.FAILURES_IN_A_ROW", 2)
    with pytest.raises(RecordError, match="2 samples in a row failed"):
        run(vlm, study(questions, ByLayer()), tmp_path / "soon", batch_size=1)
    assert len(RowFile(tmp_path / "soon/rows.jsonl", StudyRow).read()) == 2


def test_a_token_outside_the_vocabulary_is_told_of(vlm, questions, tmp_path, monkeypatch):
    monkeypatch.setattr("vlmflow.flow.prediction.spellings", lambda *args: [(10_000,)])
    with pytest.raises(RecordError, match="token 10000 is outside the vocabulary of"):
        run(vlm, study(questions, ByLayer()), tmp_path / "out")


def test_nothing_left_is_told_of(vlm, questions, tmp_path):
    line = questions.read_text().splitlines()[2]
    questions.write_text(line)
    with pytest.raises(RecordError, match="no sample is left: 1 of 1 were answered right about a blank picture"):
        run(vlm, study(questions, ByLayer()), tmp_path / "out")
    assert len(RowFile(tmp_path / "out/rows.jsonl", StudyRow).read()) == 1


def test_a_broken_row_is_named(vlm, questions, tmp_path):
    run(vlm, study(questions, ByLayer()), tmp_path / "out")
    rows = tmp_path / "out/rows.jsonl"
    rows.write_bytes(b'{"id": "q0"}\n' + rows.read_bytes())
    with pytest.raises(RecordError, match=r"rows.jsonl, line 1: not a row of this kind of run"):
        run(vlm, study(questions, ByLayer()), tmp_path / "out")


# -- figures


def curves(path):
    """The names that a figure's marks carry."""
    tree = ElementTree.fromstring(path.read_text())
    return [element.attrib["id"] for element in tree.iter() if "id" in element.attrib]


def is_png(path):
    with Image.open(path) as picture:
        picture.load()
        return picture.format == "PNG" and picture.width > 300 and len(picture.convert("L").getcolors()) > 10


def test_figures_show_every_curve(tmp_path):
    rising = [Interval(1.0, 0.5, 2.0), Interval(2.0, 1.0, 3.0), Interval(0.0, 0.0, 0.0)]
    analysis.by_layer(tmp_path / "a", [0, 1, 2], {"one": rising, "two": rising}, "importance", "title")
    assert {"one", "two"} <= set(curves(tmp_path / "a.svg"))
    ratio = [Interval(math.inf, 0.0, math.inf), Interval(*[math.nan] * 3), Interval(-1.0, -math.inf, 0.0)]
    analysis.log_ratios(tmp_path / "b", ["0", "1", "2"], {"one": rising, "two": rising}, ratio, "title")
    assert {"one", "two", "D"} <= set(curves(tmp_path / "b.svg"))
    analysis.consistencies(tmp_path / "c", ["first", "last", "all"], {"label": {"one": rising, "two": rising}}, "title")
    assert {"label: one", "label: two"} <= set(curves(tmp_path / "c.svg"))
    analysis.lengths(tmp_path / "d", {"image": [576] * 5, "text": list(range(200))}, "title")
    flows = {"into this": np.zeros((10, 8)), "into that": np.random.default_rng(0).random((10, 8))}
    picture = Image.open(SCENES[0].image)
    maps.flow_maps(tmp_path / "e", [picture, picture], whole_tiles([(2, 2), (2, 2)]), range(10), flows, "title")
    assert all(is_png(tmp_path / f"{name}.png") for name in "abcde")
    before = (tmp_path / "a.svg").read_bytes()
    analysis.by_layer(tmp_path / "a", [0, 1, 2], {"one": rising, "two": rising}, "importance", "title")
    assert (tmp_path / "a.svg").read_bytes() == before


def test_patches_of_tiles_are_drawn_where_they_are_in_the_image(tmp_path):
    """A small picture of 1 x 1, then two tiles of 2 x 2, the second's rows with an end: all faded but three patches."""
    tiles = [
        *(Tile(0, (0.0, 0.0, 0.5, 1.0), 2, 2, 0, 2), Tile(0, (0.5, 0.0, 1.0, 1.0), 2, 2, 4, 3)),
        Tile(0, WHOLE, 1, 1, 10, 1),
    ]
    red = Image.new("RGB", (80, 40), (255, 0, 0))

    def pure(kept: list[int]) -> np.ndarray:
        maps.kept_patches(tmp_path / "a.png", [red], tiles, {"one": {2: kept}}, "")
        with Image.open(tmp_path / "a.png") as picture:
            return (np.asarray(picture.convert("RGB")) == (255, 0, 0)).all(2)[:, picture.width // 4 :]

    whole = pure([*range(11)])
    down, across = np.flatnonzero(whole.any(1)), np.flatnonzero(whole.any(0))
    top, left, bottom, right = down[0], across[0], down[-1] + 1, across[-1] + 1
    shown = pure([10, 1, 6, 7])[top:bottom, left:right]  # token 6 ends a row, and is no patch
    height, width = shown.shape
    small, gap = width * 256 // (256 + 8 + 512), width * 8 // (256 + 8 + 512)
    cell = (width - small - gap) // 4
    assert shown[5:-5, 5 : small - 5].all()
    mosaic = shown[:, small + gap :]
    drawn = [
        [mosaic[row * height // 2 :, column * cell :][height // 4, cell // 2] for column in range(4)] for row in (0, 1)
    ]
    assert np.array(drawn).astype(int).tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]


def test_a_figure_has_no_empty_band(tmp_path):
    curve = [Interval(0.4, 0.3, 0.5), Interval(0.2, 0.1, 0.3)]
    analysis.log_ratios(tmp_path / "a", ["0-1", "2-3"], {"one": curve, "two": curve}, curve, "title")
    with Image.open(tmp_path / "a.png") as picture:
        ink = (np.asarray(picture.convert("L")) < 255).any(axis=1)
    rows = np.flatnonzero(np.concatenate([[True], ink, [True]]))
    assert np.diff(rows).max() < len(ink) / 20


# -- the command line


@pytest.mark.parametrize(
    ("command", "drawn", "named"),
    [
        (
            ["saliency", "--layers", "0-2,9"],
            ["contributions", "flows", "lengths"],
            {
                "contributions": ["system tokens (S_sys)", "image tokens (S_img)", "instruction tokens (S_ins)"],
                "flows": ["visual-textual (S_vt)", "intra-visual (S_vv)"],
            },
        ),
        (
            ["knockout", "--windows", "5"],
            ["consistency", "windows"],
            {
                "consistency": [f"{m} consistency: visual-{p} flow" for m in MEASURES for p in ("textual", "random")],
                "windows": ["intra-visual flow", "visual-textual flow", "D"],
            },
        ),
    ],
)  # fmt: skip
def test_commands_write_figures_and_a_verdict(questions, tmp_path, command, drawn, named):
    args = ["flow", *command, "--samples", questions, "--device", "cpu", "--out", tmp_path / "out"]
    made = vlmflow(*args, "--json")
    assert made.exit_code == 0, made.output
    summary = json.loads(made.stdout)
    assert summary == json.loads((tmp_path / "out/summary.json").read_text())
    verdict = (tmp_path / "out/verdict.md").read_text()
    assert verdict in made.stderr
    assert "## H1" in verdict
    assert "too few to trust intervals (under 20)" in verdict
    for stem in drawn:
        assert is_png(tmp_path / f"out/{stem}.png")
        found = curves(tmp_path / f"out/{stem}.svg")
        assert [found.count(name) for name in named.get(stem, [])] == [1] * len(named.get(stem, []))
    before = files(tmp_path / "out")
    assert vlmflow(*args).exit_code == 0
    assert files(tmp_path / "out") == before
    refused = vlmflow(*args, "--seed", "7")
    assert refused.exit_code == 2
    assert re.fullmatch(r"vlmflow: .* seed was 0, is 7\. Take another folder for this one", refused.stderr.strip())
    assert files(tmp_path / "out") == before


def test_show_draws_patches(tmp_path):
    made = vlmflow("flow", "show", "--image", SCENES[0].image, "--prompt", COLOUR, "--layers", "0,8-9", "--out", tmp_path / "out", "--json")  # fmt: skip  # noqa: E501
    assert made.exit_code == 0, made.output
    record = json.loads(made.stdout)
    assert record == json.loads((tmp_path / "out/flow.json").read_text())
    assert record["layers"] == [0, 8, 9]
    assert record["importance"]["into each other"][2] == 0
    assert min(record["importance"]["into the instruction"]) > 0
    assert is_png(tmp_path / "out/flow.png")
    assert ElementTree.fromstring((tmp_path / "out/flow.svg").read_text()).tag.endswith("svg")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["saliency"], "name either a --task or a file of --samples"),
        (["saliency", "--task", "pico", "--samples", "x.jsonl"], "name either a --task or a file of --samples"),
        (["saliency", "--samples", "x.jsonl", "--source", "x"], "--source goes with --task"),
        (["saliency", "--task", "aokvqa", "--source", "gone"], "gone: no such file"),
        (["saliency", "--task", "easy_vqa", "--split", "middle"], "easy_vqa: split must be test or train"),
        (["knockout", "--task", "poetry"], "unknown task 'poetry'; choose from"),
        (["knockout", "--task", "pico", "--limit", "1", "--windows", "3"], "windows must be 1, 2 or 5, got 3"),
        (["knockout", "--task", "pico", "--limit", "1", "--layers", "4-2"], "--layers wants numbers and ranges"),
        (["saliency", "--task", "pico", "--limit", "1", "--layers", "10"], "layer 10, but this model"),
        (["saliency", "--task", "pico_captions", "--limit", "1"], "no answer that is right or wrong"),
        (["saliency", "--task", "pico", "--limit", "1", "--device", "toaster"], "device 'toaster'"),
        (["saliency", "--samples", "gone.jsonl"], "gone.jsonl: no such file"),
        (["saliency", "--samples", "broken.jsonl"], "broken.jsonl, line 2, column 2: broken JSON"),
        (["saliency", "--samples", "imageless.jsonl"], "imageless.jsonl, line 1: 'image' is missing"),
        (["saliency", "--samples", "lost.jsonl"], "lost.jsonl, line 1: image gone.png not found"),
        (["knockout", "--samples", "mute.jsonl"], "mute.jsonl, line 1: no answer that is right or wrong"),
        (["show", "--image", "gone.png", "--prompt", "?"], "no image file at gone.png"),
        (["show", "--image", "scene.png", "--prompt", " "], "the prompt is empty"),
        (["show", "--image", "scene.png", "--prompt", "?", "--layers", "99"], "layer 99, but this model"),
        (["show", "--image", "scene.png", "--prompt", "?", "--layers", "3-12345"], "names layers that no model has"),
        (["saliency", "--samples", "textual.jsonl"], "textual.jsonl, line 2: no image, from which information"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.open(SCENES[0].image).save("scene.png")
    good = {"image": "scene.png", "question": COLOUR, "answer": "red"}
    for name, lines in {
        "broken": [json.dumps(good), "{"],
        "imageless": [json.dumps({"question": COLOUR, "answer": "red"})],
        "lost": [json.dumps(good | {"image": "gone.png"})],
        "mute": [json.dumps(good | {"answer": ""})],
        "textual": [json.dumps(good), json.dumps(good | {"image": []})],
    }.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    made = vlmflow("flow", *args, "--out", "out")
    assert made.exit_code == 2, made.output
    assert made.stdout == ""
    (said,) = made.stderr.strip().split("\n")
    assert says in said
    assert not (tmp_path / "out").exists()
