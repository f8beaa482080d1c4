"""Evaluations by Ray's workers: whoever is killed, the files end as one process writes them."""

import functools
import math
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from commands import NORM
from vlmflow.cli import app
from vlmflow.evaluate.budgets import for_task
from vlmflow.evaluate.evaluation import Evaluation
from vlmflow.evaluate.on_ray import Loading, connected
from vlmflow.evaluate.rows import rows_of
from vlmflow.evaluate.runner import collect, run
from vlmflow.models import load
from vlmflow.records.files import RecordError
from vlmflow.records.folder import Folder
from vlmflow.tasks import TASKS

ray = pytest.importorskip("ray")
PICO = Loading.named("pico", "cpu", "auto")


@pytest.fixture(scope="module")
def norm(tmp_path_factory) -> str:
    """A class that a file holds, so that it cannot be imported by name where the workers are."""
    file = tmp_path_factory.mktemp("method") / "norm.py"
    file.write_text(NORM)
    return f"{file}:Norm"


@pytest.fixture(scope="module")
def asked(norm) -> Evaluation:
    return Evaluation(TASKS["pico"], *for_task(norm, {}, "qa", 10), limit=16, max_new_tokens=4)


@pytest.fixture(scope="module")
def alone(asked, tmp_path_factory) -> Path:
    """What one process makes of it."""
    out = tmp_path_factory.mktemp("alone")
    run(load("pico", device="cpu"), asked, out, batch_size=2)
    return out


def files(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "summary.json").read_bytes(), (folder / "rows.jsonl").read_bytes()


def test_a_killed_worker_loses_nothing(asked, alone, tmp_path):
    marker, samples = tmp_path / "killed", asked.samples()
    rule = asked.task.rules["text"]

    def deadly(text, sample):
        if sample.id == samples[7].id and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return rule(text, sample)

    doomed = replace(asked, task=replace(asked.task, rules={"text": deadly}))
    how = {"batch_size": 2, "samples": samples, "progress": lambda *_: None}
    with connected(PICO, workers=2) as pool:
        collect(pool, doomed, tmp_path / "out", **how)
        assert marker.exists()
        assert files(tmp_path / "out") == files(alone)
        began = []
        collect(pool, doomed, tmp_path / "out", **{**how, "progress": lambda done, *_: began.append(done)})
        assert began == [16]
        vars(pool)["facts"] = replace(pool.facts, weights="other")
        with pytest.raises(RecordError, match=r'^Ray: RecordError: on .* would be others: weights was "other"'):
            collect(pool, asked, tmp_path / "other", **how)


def drive(pruner: str, out: Path, answered: Path) -> None:
    """The command, with workers that take two seconds a batch and note which of them has answered a sample."""
    score = TASKS["pico"].score

    def noted(parsed, sample):
        time.sleep(1)
        (answered / sample.id.replace("/", " ")).write_text(str(os.getpid()))
        return score(parsed, sample)

    TASKS["pico"] = replace(TASKS["pico"], score=noted)
    args = ["--task", "pico", "--limit", "16", "--batch-size", "2", "--max-new-tokens", "4", "--device", "cpu"]
    app(["eval", *args, "--pruner", pruner, "--engine", "ray", "--workers", "2", "--out", str(out)])


def test_a_killed_driver_goes_on(norm, asked, alone, tmp_path):
    """Of what a worker has finished at most the last batch is lost: by the time of the next one it is on disk."""
    out, answered = tmp_path / "out", tmp_path / "answered"
    answered.mkdir()
    driver = multiprocessing.get_context("spawn").Process(target=drive, args=(norm, out, answered), daemon=True)
    driver.start()
    while driver.is_alive() and len(list(answered.iterdir())) < 11:
        time.sleep(0.01)
    by = {file.name.replace(" ", "/"): file.read_text() for file in answered.iterdir()}
    driver.kill()
    driver.join()
    assert driver.exitcode == -signal.SIGKILL
    assert not (out / "summary.json").exists()
    ids = [sample.id for sample in asked.samples()]
    kept = rows_of(Folder(out)).read().keys()
    batches = [
        (first, second) for first, second in zip(ids[::2], ids[1::2], strict=True) if {first, second} <= by.keys()
    ]
    assert len(batches) >= 5
    lost = [by[first] for first, _ in batches if first not in kept]
    assert len(lost) == len(set(lost)) <= 2
    began = []
    run(load("pico"), asked, out, batch_size=2, progress=lambda done, *_: began.append(done))
    assert began[0] == len(kept) < 16
    assert files(out) == files(alone)


def test_workers_do_a_study(tmp_path):
    args = ["flow", "saliency", "--task", "pico", "--limit", "6", "--batch-size", "2", "--device", "cpu"]
    for engine in (["ray", "--workers", "2"], ["local"]):
        made = CliRunner().invoke(app, [*args, "--engine", *engine, "--out", str(tmp_path / engine[0])])
        assert made.exit_code == 0, made.output
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    assert '"workers": 2' in (tmp_path / "ray/log.jsonl").read_text()
    assert (tmp_path / "ray/verdict.md").read_text() == (tmp_path / "local/verdict.md").read_text()


# -- what is refused


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"workers": 1, "gpus": -1}, "GPUs a worker must be 0 or more, got -1"),
        ({"workers": 1, "gpus": math.nan}, "GPUs a worker must be 0 or more, got nan"),
        ({"workers": 1, "address": "127.0.0.1:1"}, r"no Ray cluster answers at 127.0.0.1:1 \(Connection refused\)"),
        ({"workers": 1, "address": "ray://127.0.0.1:1"}, "address is auto or host:port"),
        ({"workers": 1, "address": "auto"}, "Could not find any running Ray instance"),
    ],
    ids=lambda value: str(value),
)
def test_pools_that_cannot_be(args, says, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", functools.cache(set))  # none of other tests
    with pytest.raises(RecordError, match=says), connected(PICO, **args):
        pass


def test_a_cluster_that_is_too_small(monkeypatch):
    there = {"CPU": 8.0, "GPU": 1.0}
    monkeypatch.setattr(ray, "init", lambda *args, **fields: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: there)
    with pytest.raises(RecordError, match="2 workers need 2 GPUs; the cluster has 1"), connected(PICO, 2):
        pass
    with connected(PICO, 2, gpus=0.5) as pool:
        assert pool.gpus == 0.5
    there.pop("GPU")
    with pytest.raises(RecordError, match="9 workers need 9 CPUs; the cluster has 8"), connected(PICO, 9):
        pass


def test_without_ray_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    args = ["eval", "--task", "pico", "--limit", "1", "--engine", "ray", "--out", str(tmp_path)]
    made = CliRunner().invoke(app, args)
    assert made.exit_code == 2
    assert made.stderr.strip() == 'vlmflow: Ray is not installed: pip install "vlmflow[ray]"'
