"""vlmflow inside lmms-eval: task files say what our tasks say, and the harness measures what our runner does."""

import json
import os
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from PIL import Image

from commands import NORM
from vlmflow.evaluate.evaluation import Evaluation
from vlmflow.evaluate.runner import run
from vlmflow.models import load
from vlmflow.pico import samples
from vlmflow.plugins.lmms_eval import TASK_FILES, bridge
from vlmflow.pruners import make_pruner
from vlmflow.tasks import TASKS, Source

PICTURE = Image.new("L", (8, 8))
DOCS = {
    "aokvqa": {"question_id": "q", "question": "What?", "choices": ["a b", "c"], "correct_choice_idx": 1},
    "scienceqa": {"question": "Which?", "choices": ["a b", "c"], "answer": 1, "hint": "Look."},
    "pope": {"question": "Is there a cat?", "answer": "yes", "category": "random", "question_id": "1"},
    "nocaps": {"image_id": 3, "annotations_captions": ["a cat on a mat .", "a cat"]},
    "flickr30k": {"img_id": "3", "caption": ["a cat on a mat .", "a cat"]},
}
RIGHT = {"aokvqa": "B.", "scienceqa": "(B)", "pope": "Yes, there is.", "nocaps": "a cat", "flickr30k": "a cat"}


class Loader(yaml.SafeLoader):
    """Of task files; a function is its name."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
FILES = {path.stem.removeprefix("vlmflow_"): yaml.load(path.read_text(), Loader) for path in TASK_FILES.glob("*.yaml")}


def function(name: str):
    module, _, own = name.rpartition(".")
    assert module == bridge.__name__
    return getattr(bridge, own)


def test_every_task_that_needs_no_judge_has_a_file():
    assert FILES.keys() == bridge.BRIDGES.keys() == DOCS.keys()
    assert FILES.keys() == {name for name, task in TASKS.items() if task.hub and not task.rubric}


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_says_what_the_task_says(name):
    file, task, doc = FILES[name], TASKS[name], DOCS[name]
    assert file["task"] == f"vlmflow_{name}"
    hub = task.hub
    assert (file["dataset_path"], file.get("dataset_name"), file["test_split"]) == (hub.id, hub.config, hub.split)
    assert file["generation_kwargs"] == {"max_new_tokens": task.max_new_tokens, "do_sample": False}
    sample = function(file["process_results"]).__self__.sample(doc)
    assert function(file["doc_to_text"])(doc) == task.prompts["paper"](sample)
    assert function(file["doc_to_target"])(doc) in (sample.answer, *sample.references)
    (image,) = function(file["doc_to_visual"])({**doc, "image": PICTURE})
    assert (image.mode, image.size) == ("RGB", (8, 8))
    records = function(file["process_results"])(doc, [RIGHT[name]])
    assert [own["metric"] for own in file["metric_list"]] == list(records)
    outcome = task.outcome(sample, RIGHT[name])
    assert all(record["parsed"] == outcome.parsed for record in records.values())
    wrong = function(file["process_results"])(doc, ["perhaps"])
    pair = [json.loads(json.dumps(own[next(iter(records))])) for own in (records, wrong)]
    metric = task.metric([outcome, task.outcome(sample, "perhaps")])
    first, *_ = file["metric_list"]
    assert function(first["aggregation"])(pair) == pytest.approx(metric["value"])
    for own in file["metric_list"]:
        assert function(own["aggregation"])(pair) == pytest.approx(
            {metric["figure"]: metric["value"], **metric, **metric.get("overall", {})}[own["metric"]]
        )


def test_names_that_no_file_should_use():
    for name in ("cat_text", "pope_nonsense", "dog"):
        with pytest.raises(AttributeError):
            getattr(bridge, name)


def test_the_entry_point_and_the_folder():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["lmms_eval.models"] == {"vlmflow": "vlmflow.plugins.lmms_eval:manifests"}
    assert "plugins/lmms_eval/tasks/*.yaml" in project["tool"]["setuptools"]["package-data"]["vlmflow"]
    told = subprocess.run(
        [sys.executable, "-m", "vlmflow.plugins.lmms_eval"], capture_output=True, text=True, check=True
    )
    assert Path(told.stdout.strip()) == TASK_FILES


# -- the harness itself (make lmms)

harness = pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed; make lmms runs this")


@pytest.fixture
def local(tmp_path):
    """Yes-or-no questions about pico's bundled scenes as a data set of POPE's columns, and a task file for it."""
    import datasets

    rows = []
    for number, scene in enumerate(samples()[:4]):
        asked = [question for question in scene.questions if set(question.answers) & {"yes", "no"}]
        for question in asked[:4]:
            rows.append(
                {
                    "question_id": str(len(rows)),
                    "question": question.text,
                    "answer": question.answers[0],
                    "category": "random",
                    "image_source": scene.image.name,
                    "image": {"bytes": scene.image.read_bytes(), "path": None},
                }
            )
        assert asked, f"scene {number} asks nothing of the kind"
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    (tmp_path / "data").mkdir()
    table.to_parquet(tmp_path / "data/test.parquet")
    task = f"include: {TASK_FILES}/vlmflow_pope.yaml\ntask: local_pope\ndataset_path: {tmp_path}/data\n"
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/local_pope.yaml").write_text(task)
    return tmp_path


@harness
@pytest.mark.parametrize(
    ("method", "fields"), [("himap", "k1=1,k2=3"), ("himap", "k1=1,r1=0.25,k2=4"), ("norm.py:Norm", "k=3,ratio=0.75")]
)
def test_the_harness_measures_what_our_runner_does(local, method, fields):
    (local / "norm.py").write_text(NORM)
    spec = str(local / method) if ":" in method else method
    pruner = make_pruner(spec, dict(pair.split("=") for pair in fields.split(",")), n_layers=10)
    source = Source(hub=str(local / "data"))
    ours = run(load("pico", "cpu"), Evaluation(TASKS["pope"], pruner, source=source), local / "ours", batch_size=4)
    command = Path(sys.executable).with_name("lmms-eval")
    args = ["--model", "vlmflow", "--model_args", f"pretrained=pico,pruner={spec},{fields}", "--device", "cpu"]
    where = ["--tasks", "local_pope", "--include_path", local / "tasks", "--output_path", local / "theirs"]
    made = subprocess.run(
        [command, "eval", *args, *where, "--batch_size", "4", "--log_samples"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(local / "home")},
    )
    assert made.returncode == 0, made.stderr[-3000:]
    (results,) = (local / "theirs").rglob("*_results.json")
    (logged,) = (local / "theirs").rglob("*_samples_local_pope.jsonl")
    theirs = json.loads(results.read_text())["results"]["local_pope"]
    for name, value in ours["metric"]["overall"].items():
        assert theirs[f"{name},none"] == pytest.approx(value)
    lines = [json.loads(line) for line in logged.read_text().splitlines()]
    rows = [json.loads(line) for line in (local / "ours/rows.jsonl").read_text().splitlines()]
    said = {line["doc_id"]: (line["input"], line["accuracy"]["answer"]) for line in lines}
    assert [said[number] for number in range(len(rows))] == [(row["prompt"], row["answer"]) for row in rows]
