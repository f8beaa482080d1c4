"""What pruning does to the embedded model, offline: docs/results.md, a table in its card, its scores in docs/pico.md.

    python bench/results.py                # about half an hour on two cores; stopped, it goes on where it was
    python bench/results.py --pages        # the pages alone, from the files beside them

Every method at three budgets on pico's scenes and on easy-VQA, in batches of 16; then the first questions again one by
one, to see that batching changes no answer.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from report import put, table

from vlmflow.pico import MODEL_DIR
from vlmflow.records.files import read_json, write_json, write_text
from vlmflow.records.folder import Folder

ROOT = Path(__file__).parents[1]
PAGE, PICO_PAGE, CARD = ROOT / "docs" / "results.md", ROOT / "docs" / "pico.md", MODEL_DIR / "README.md"
FOLDER = PAGE.with_suffix("")
BUDGETS = "0.5,0.3,0.2"  # of the image tokens a layer; HiMAP's own setting, scaled to ten layers, is 0.29
LIMITS = {"pico": 600, "easy_vqa": 400}  # questions, of the first pictures
ONE_BY_ONE = 100  # questions
WANTED = {  # of the unpruned model, in percent; captions in CIDEr-D
    "existence": 92,
    "exist_adversarial": 88,
    "multiple choice": 88,
    "colour": 92,
    "position": 92,
    "count": 75,
    "identity": None,
    "caption": 100,
}


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
        one, many = Folder(path).rows.read(), Folder(batched / path.name).rows.read()
        runs[path.name] = {"asked": len(one), "other": [key for key in one if one[key].answer != many[key].answer]}
    return runs


def measured(task: str, work: Path) -> None:
    """Run a task's sweeps and keep what the page is made of."""
    batched, alone = work / task, work / f"{task}-alone"
    command = sweep(task, LIMITS[task], 16, batched)
    sweep(task, ONE_BY_ONE, 1, alone)
    write_json(FOLDER / f"{task}.json", {"command": command, "agreement": agreement(batched, alone)})
    for name, kept in (("sweep.md", f"{task}.md"), ("sweep.json", f"{task}-lines.json"), ("pareto.png", f"{task}.png")):
        shutil.copyfile(batched / name, FOLDER / kept)


def result(task: str) -> str:
    """A task's block of the page."""
    record = read_json(FOLDER / f"{task}.json")
    lines = (FOLDER / f"{task}.md").read_text().replace("(pareto.png)", f"(results/{task}.png)")
    runs = record["agreement"].values()
    asked, other = sum(run["asked"] for run in runs), sum(len(run["other"]) for run in runs)
    agrees = (
        f"Asked one by one, {asked - other} of {asked} answers ({len(runs)} runs) are those given in batches of 16."
    )
    return f"`{record['command']}`\n\n{lines.strip()}\n\n{agrees}"


def pruning() -> str:
    """The model card's table: what each method keeps of all questions about pico's scenes."""
    lines = read_json(FOLDER / "pico-lines.json")["lines"]
    rows = [
        [
            line["method"],
            "" if line["budget"] is None else f"{line['budget']:.0%}",
            interval(line["value"], line["low"], line["high"], ".1f"),
            "" if line["difference"] is None else f"{line['difference']:+.1f}",
            f"{line['mean_image_tokens']:.0f}",
            f"{line['exact_share']:.0%}",
        ]
        for line in lines
        if line["value"] is not None
    ]
    command = read_json(FOLDER / "pico.json")["command"]
    header = ["method", "budget", "right, %", "against none", "image tokens a layer", "FLOPs"]
    return f"`{command}`; by kind of question in the project's docs/results.md.\n\n{table(header, rows)}"


def interval(value: float, low: float, high: float, form: str = ".0f") -> str:
    """A figure with its bounds."""
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def score_card() -> str:
    """The unpruned model by kind of question."""
    card = read_json(MODEL_DIR / "results.json")
    sets = {"held-out scenes": None, "new pairs": None, "held-out questions, blank picture": "blank picture"}
    rows = []
    for kind, wanted in WANTED.items():
        figures = [card["sets"][name][kind] for name in sets]
        cells = [interval(one["value"], one["low"], one["high"]) for one in figures]
        rows.append([f"{kind} (CIDEr-D)" if kind == "caption" else kind, "" if wanted is None else str(wanted), *cells])
    easy = card["sets"]["easy-vqa test"]["all"]
    rows.append(["easy-VQA, test", "95", interval(easy["value"], easy["low"], easy["high"]), "", ""])
    header = ["", "wanted", *(short or name for name, short in sets.items())]
    return f"`{card['command']}`, {card['pictures']} pictures a set:\n\n{table(header, rows)}"


def pages() -> dict[Path, dict[str, str]]:
    """What stands in which block of which page."""
    return {
        PAGE: {task: result(task) for task in LIMITS},
        PICO_PAGE: {"score-card": score_card()},
        CARD: {"pruning": pruning()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", action="store_true", help="write the pages alone")
    parser.add_argument("--work", type=Path, default=Path("runs/results"), help="folder for the rows")
    options = parser.parse_args()
    if not options.pages:
        for task in LIMITS:
            measured(task, options.work)
    for path, blocks in pages().items():
        page = path.read_text()
        for name, body in blocks.items():
            page = put(page, name, body)
        write_text(path, page)


if __name__ == "__main__":
    main()
