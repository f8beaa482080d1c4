"""Write docs/results.md, and the score card in docs/pico.md, from what was measured; no figure is typed by hand.

python -m docs.make.results
"""

from __future__ import annotations

from pathlib import Path

from docs.make.page import ROOT, put, table
from recipes.pico import RECORD
from vlmflow.records.files import read_json, write_text

PAGE, PICO_PAGE = ROOT / "docs" / "results.md", ROOT / "docs" / "pico.md"
FOLDER = PAGE.with_suffix("")
TASKS = ("pico", "easy_vqa")
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


def result(task: str) -> str:
    """A task's block of the page."""
    record = read_json(FOLDER / f"{task}.json")
    lines = (FOLDER / f"{task}.md").read_text().replace(f"({task}.png)", f"(results/{task}.png)")
    runs = record["agreement"].values()
    asked, other = sum(run["asked"] for run in runs), sum(len(run["other"]) for run in runs)
    agrees = (
        f"Asked one by one, {asked - other} of {asked} answers ({len(runs)} runs) are those given in batches of 16."
    )
    return f"`{record['command']}`\n\n{lines.strip()}\n\n{agrees}"


def interval(value: float, low: float, high: float) -> str:
    """A figure with its bounds."""
    return f"{value:.0f} [{low:.0f}, {high:.0f}]"


def score_card() -> str:
    """The unpruned model by kind of question."""
    card = read_json(RECORD / "results.json")
    sets = {"held-out scenes": None, "new pairs": None, "held-out questions, blank picture": "blank picture"}
    rows = []
    for kind, wanted in WANTED.items():
        figures = [card["sets"][name][kind] for name in sets]
        cells = [interval(figure["value"], figure["low"], figure["high"]) for figure in figures]
        rows.append([f"{kind} (CIDEr-D)" if kind == "caption" else kind, "" if wanted is None else str(wanted), *cells])
    easy = card["sets"]["easy-vqa test"]["all"]
    rows.append(["easy-VQA, test", "95", interval(easy["value"], easy["low"], easy["high"]), "", ""])
    header = ["", "wanted", *(short or name for name, short in sets.items())]
    return f"`{card['command']}`, {card['pictures']} pictures a set:\n\n{table(header, rows)}"


def pages() -> dict[Path, dict[str, str]]:
    """What stands in which block of which page."""
    return {
        PAGE: {task: result(task) for task in TASKS},
        PICO_PAGE: {"score-card": score_card()},
    }


def main() -> None:
    """Write the pages."""
    for path, blocks in pages().items():
        page = path.read_text()
        for name, body in blocks.items():
            page = put(page, name, body)
        write_text(path, page)


if __name__ == "__main__":
    main()
