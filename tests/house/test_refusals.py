"""Every refusal is promised by its words, and a test quotes them: those that stand in no other file are raised here."""

import ast
import csv
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import tiny
from vlmflow import HiMAP, attach
from vlmflow.cli.options import LauncherOptions
from vlmflow.engine.target import Target
from vlmflow.evaluate import launch
from vlmflow.evaluate.on_ray import Loading
from vlmflow.evaluate.rows import Row
from vlmflow.records.files import RecordError
from vlmflow.records.folder import Folder
from vlmflow.tasks import TASKS, Source, TaskError

ROOT = Path(__file__).parents[2]
IN_A_ROW = 3  # words of a message that a test must quote; all where it has fewer


def texts(tree: ast.AST) -> Iterator[str]:
    """The fixed texts in some code, also those between the braces of an f-string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def words(text: str) -> list[str]:
    """The words of a text or of a regular expression for it."""
    return re.findall(r"[\w'-]+", re.sub(r"\\(?=\W)", "", text))


def runs(text: list[str], count: int) -> Iterator[tuple[str, ...]]:
    """All so many words in a row."""
    return zip(*(text[start:] for start in range(count)), strict=False)


def test_a_test_quotes_every_message():
    tests = [words(text) for path in (ROOT / "tests").rglob("*.py") for text in texts(ast.parse(path.read_text()))]
    said = {run for text in tests for count in range(1, IN_A_ROW + 1) for run in runs(text, count)}
    unquoted = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Raise) or node.exc is None:
                continue
            parts = [words(text) for text in texts(node.exc)]
            count = min(IN_A_ROW, max(map(len, parts), default=0))
            if count and not said & {run for part in parts for run in runs(part, count)}:
                unquoted.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert unquoted == []


# -- refusals that need a stand-in


@dataclass(frozen=True)
class Passing:
    """A tap that lets every call pass."""

    layers: tuple[int, ...]

    def __call__(self, call):
        return call.kernel.run()


def test_a_tap_on_a_layer_without_keys_of_its_own(monkeypatch):
    small = tiny.build("qwen3_5")
    recurrent = Target.find(small.model).attends.index(False)
    with pytest.raises(ValueError, match=f"a tap wants layer {recurrent}, which is recurrent and has no attention"):
        attach(small.model, taps=[Passing((recurrent,))])
    monkeypatch.setattr(Target, "sources", (0, 1, 2, 3, 3, 3))
    with pytest.raises(ValueError, match="a tap wants layer 5, whose keys are another's and hold dropped tokens"):
        attach(tiny.build("llava").model, HiMAP(k1=2, k2=4), taps=[Passing((2, 5))])


def test_one_model_a_process_under_torchrun(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(ValueError, match="--engine ray starts its own workers; run it without torchrun"):
        LauncherOptions(engine="ray").on_ray(None)
    with pytest.raises(ValueError, match="--device auto spreads one model over all accelerators; torchrun wants one"):
        launch.launch(
            lambda attends: pytest.fail("a model was loaded"),
            Loading("pico", "pico", "auto"),
            Path("out"),
            None,
            batch_size=1,
            samples=[],
            progress=lambda *_: None,
        )


def test_a_preset_of_no_task():
    """By whoever runs without a checker of types."""
    preset = inspect.unwrap(HiMAP.preset.__func__)
    with pytest.raises(ValueError, match=r"HiMAP\.preset: task must be 'qa' or 'caption', got 'vqa'"):
        preset(HiMAP, "vqa", 32)


def test_what_lmms_eval_must_not_ask(monkeypatch):
    """Without lmms-eval, of whose modules the plug-in wants three names."""
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.instance", "lmms_eval.api.model", "tqdm"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lmms_eval.api.instance"].GenerationResult = sys.modules["lmms_eval.api.instance"].TokenCounts = None
    sys.modules["lmms_eval.api.model"].lmms = object
    sys.modules["tqdm"].tqdm = None
    monkeypatch.delitem(sys.modules, "vlmflow.plugins.lmms_eval.model", raising=False)
    plugin = importlib.import_module("vlmflow.plugins.lmms_eval.model")
    monkeypatch.delitem(sys.modules, "vlmflow.plugins.lmms_eval.model")
    model = object.__new__(plugin.Vlmflow)
    with pytest.raises(NotImplementedError, match="tasks that compare likelihoods need another model"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="tasks of several rounds need another model"):
        model.generate_until_multi_round([])
    for settings in ({"do_sample": True}, {"temperature": 0.5}, {"num_beams": 3}):
        with pytest.raises(ValueError, match="vlmflow answers greedily; the task asks for {'" + next(iter(settings))):
            plugin._new_tokens(settings)
    assert plugin._new_tokens({"temperature": 0, "num_beams": 1, "max_new_tokens": 7}) == 7
    assert plugin._new_tokens({}) == plugin.MAX_NEW_TOKENS


def test_records_that_say_too_little(tmp_path):
    with pytest.raises(RecordError, match=r"has no summary\.json: finish its run first"):
        Folder(tmp_path).summary()
    row = {"id": "1", "prompt": "", "answer": "", "parsed": None, "score": None, "answer_tokens": 1, "tokens": 9}
    with pytest.raises(RecordError, match="a row: image_tokens must say how many entered layer 0"):
        Row.from_dict({**row, "question_tokens": 1, "image_tokens": {"1": 4}, "cost": None, "sample": {}})


def test_tables_that_hold_no_choices(tmp_path, monkeypatch):
    file = tmp_path / "x.tsv"
    file.write_text("index\tquestion\tanswer\timage\n1\tWhich?\tA\t\n")
    with pytest.raises(TaskError, match=r"no option columns 'A', 'B' \.\.\. \(there are: index, question, answer\)"):
        TASKS["scienceqa"].samples(Source(file))
    file.write_text(f"index\tquestion\n1\t{'x' * csv.field_size_limit()}x\n")
    monkeypatch.setattr(csv, "field_size_limit", lambda limit: None)
    with pytest.raises(TaskError, match=r"x\.tsv: broken TSV \(field larger than field limit"):
        TASKS["scienceqa"].samples(Source(file))
