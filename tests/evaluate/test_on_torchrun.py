"""Evaluations by the processes of one torchrun, stopped and started again: the files end as one process writes them."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from commands import NORM, vlmflow
from vlmflow.evaluate.budgets import for_task
from vlmflow.evaluate.evaluation import Evaluation
from vlmflow.evaluate.runner import run
from vlmflow.models import load
from vlmflow.tasks import TASKS

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vlmflow"]
EVAL = ["eval", "--task", "pico", "--limit", "17", "--batch-size", "2", "--max-new-tokens", "4", "--device", "cpu"]


def files(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "summary.json").read_bytes(), (folder / "rows.jsonl").read_bytes()


def launch(*args) -> subprocess.Popen:
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*LAUNCH, *map(str, args)], env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)


def test_two_processes_write_what_one_does(tmp_path):
    """Of a method in a file, which each of them reads."""
    (tmp_path / "norm.py").write_text(NORM)
    method = f"{tmp_path / 'norm.py'}:Norm"
    out = tmp_path / "out"
    command = [*EVAL, "--pruner", method, "--out", out]
    rows = out / "rows.jsonl"
    first = launch(*command)
    while first.poll() is None and (not rows.exists() or rows.read_bytes().count(b"\n") < 2):
        time.sleep(0.01)
    first.terminate()
    first.communicate()
    assert first.returncode != 0
    assert not (out / "summary.json").exists()
    held = rows.read_bytes().count(b"\n")
    second = launch(*command)
    said, notes = second.communicate()
    assert second.returncode == 0, notes
    assert said.count("accuracy") == 1
    assert "norm k=2, ratio=0.5 (norm.py, sha256" in " ".join(said.split())
    asked = Evaluation(TASKS["pico"], *for_task(method, {}, "qa", 10), limit=17, max_new_tokens=4)
    run(load("pico", device="cpu"), asked, tmp_path / "alone", batch_size=2)
    assert 2 <= held < 17
    assert files(out) == files(tmp_path / "alone")
    finished = launch(*command)
    assert "accuracy" in finished.communicate()[0]
    assert finished.returncode == 0
    assert files(out) == files(tmp_path / "alone")


def test_a_study_is_gone_on_with_together(tmp_path):
    command = ["flow", "knockout", "--windows", "5", "--task", "pico", "--limit", "6", "--batch-size", "2"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert vlmflow(*command, "--out", alone).returncode == 0
    shutil.copytree(alone, together)
    (together / "summary.json").unlink()
    (together / "rows.jsonl").write_bytes(b"".join((alone / "rows.jsonl").read_bytes().splitlines(True)[:1]))
    process = launch(*command, "--out", together)
    said, notes = process.communicate()
    assert process.returncode == 0, notes
    assert said.count("# Knockout of pico on pico") == 1
    assert files(together) == files(alone)
    start = json.loads((together / "log.jsonl").read_text().splitlines()[-2])
    assert (start["done"], start["processes"]) == (1, 2)


def test_what_one_process_does_is_refused(tmp_path):
    refused = launch("sweep", "--task", "pico", "--out", tmp_path / "out")
    assert "sweep runs in one process" in refused.communicate()[1]
    assert refused.returncode != 0
