"""What pruning does to the embedded model, offline: every method at three budgets.

    python -m bench.results                # about half an hour on two cores; stopped, it goes on where it was

On pico's scenes and on easy-VQA, in batches of 16; then the first questions again one by one, to see that batching
changes no answer. ``docs/make/results.py`` turns the files into docs/results.md.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import ROOT
from vlmflow.evaluate.rows import rows_of
from vlmflow.records.files import write_json, write_text
from vlmflow.records.folder import Folder

FOLDER = ROOT / "docs" / "results"
BUDGETS = "0.5,0.3,0.2"  # of the image tokens a layer; HiMAP's own setting, scaled to ten layers, is 0.29
LIMITS = {"pico": 600, "easy_vqa": 400}  # questions, of the first pictures
ONE_BY_ONE = 100  # questions


def sweep(task: str, limit: int, batch_size: int, out: Path) -> str:
    """Run one sweep, or what is left of it; the command as a user would give it."""
    line = f"--task {task} --budgets {BUDGETS} --limit {limit} --batch-size {batch_size} --out {out}"
    options = shlex.split(line)
    subprocess.run([sys.executable, "-m", "vlmflow", "sweep", *options], check=True, cwd=ROOT)
    return f"vlmflow sweep {line}"


def agreement(batched: Path, alone: Path) -> dict[str, Any]:
    """How many answers of two sweeps are the same, run by run, and the questions where they are not."""
    runs = {}
    for path in sorted(settings.parent for settings in alone.glob("*/settings.json")):
        single, batch = (rows_of(Folder(folder)).read() for folder in (path, batched / path.name))
        runs[path.name] = {
            "asked": len(single),
            "other": [key for key in single if single[key].answer != batch[key].answer],
        }
    return runs


def measured(task: str, work: Path) -> None:
    """Run a task's sweeps and keep what the page is made of."""
    batched, alone = work / task, work / f"{task}-alone"
    command = sweep(task, LIMITS[task], 16, batched)
    sweep(task, ONE_BY_ONE, 1, alone)
    write_json(FOLDER / f"{task}.json", {"command": command, "agreement": agreement(batched, alone)})
    for name, kept in (("sweep.json", f"{task}-lines.json"), ("pareto.png", f"{task}.png")):
        shutil.copyfile(batched / name, FOLDER / kept)
    lines = (batched / "sweep.md").read_text(encoding="utf-8")
    write_text(FOLDER / f"{task}.md", lines.replace("(pareto.png)", f"({task}.png)"))


def main() -> None:
    """Run what is left of the sweeps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/results"), help="folder for the rows")
    options = parser.parse_args()
    for task in LIMITS:
        measured(task, options.work)


if __name__ == "__main__":
    main()
