"""The benchmarks that need no download, from source to figure; and what importing the tasks costs."""

import subprocess
import sys
from pathlib import Path

import pytest

from vlmflow.tasks import TASKS, Source, TaskError


def test_easy_vqa_is_whole():
    task = TASKS["easy_vqa"]
    samples = task.samples()
    assert len(samples) == 9673
    assert len({sample.images for sample in samples}) == 1000
    assert sum(sample.answer == "yes" for sample in samples) == 3611
    assert (samples[0].question, samples[0].answer, samples[0].group) == ("what is the red shape?", "triangle", "open")
    assert samples[0].images[0].open().size == (64, 64)
    metric = task.metric([task.outcome(sample, sample.answer) for sample in samples])
    assert (metric["value"], metric["n"], metric["unparsed"]) == (100, 9673, 0)
    always_yes = task.metric([task.outcome(sample, "Yes.") for sample in samples])
    assert always_yes["value"] == pytest.approx(100 * 3611 / 9673)
    assert always_yes["groups"]["open"] == 0
    assert len(task.samples(Source(split="train"), limit=3)) == 3
    with pytest.raises(TaskError, match="split must be test or train"):
        task.samples(Source(split="val"))
    with pytest.raises(TaskError, match="takes no path"):
        task.samples(Source(path=Path("x")))


def test_easy_vqa_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(TaskError, match=r'pip install "vlmflow\[eval\]"'):
        TASKS["easy_vqa"].samples()


def test_pico_questions():
    task = TASKS["pico"]
    samples = task.samples(limit=40)
    assert samples == task.samples(limit=40)
    assert len({sample.group for sample in samples}) > 12
    assert "caption" not in {sample.group for sample in samples}
    assert all(sample.answer in sample.references for sample in samples)
    assert samples[0].images == samples[1].images
    assert samples[0].images[0].open().size == (192, 192)
    assert samples[0].images[0].open().tobytes() == samples[1].images[0].open().tobytes()
    metric = task.metric([task.outcome(sample, f" {sample.answer}\n") for sample in samples])
    assert (metric["value"], metric["images"], set(metric["groups"].values())) == (100, 3, {100})
    assert task.outcome(samples[0], "maybe").score == 0
    others = task.samples(Source(split="new_pairs"), limit=5)
    assert {sample.id for sample in others}.isdisjoint(sample.id for sample in samples)
    with pytest.raises(TaskError, match="split must be held_out or new_pairs, got 'train'"):
        task.samples(Source(split="train"))


def test_pico_captions():
    task = TASKS["pico_captions"]
    samples = task.samples(limit=8)
    assert {sample.group for sample in samples} == {"caption"}
    assert len(samples[0].references) > 1
    perfect = task.metric([task.outcome(sample, sample.answer) for sample in samples])
    empty = task.metric([task.outcome(sample, "") for sample in samples])
    assert perfect["value"] > 100 > empty["value"] == 0
    assert empty["unparsed"] == 8


def test_guessing_does_not_pay_on_pico():
    """Balanced kinds: a blind yes is right about half the time."""
    task = TASKS["pico"]
    samples = [sample for sample in task.samples(limit=400) if sample.group.startswith("exist_")]
    share = sum(task.outcome(sample, "yes").score or 0 for sample in samples) / len(samples)
    assert 0.3 < share < 0.7


def test_importing_the_tasks_is_light():
    heavy = "('torch', 'transformers', 'datasets', 'openai', 'matplotlib', 'easy_vqa')"
    code = f"import sys, vlmflow.tasks; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
