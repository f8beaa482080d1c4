"""Small faults put into the source, one at a time: do the tests notice? ``make mutants`` runs a seeded sample.

mutmut makes the mutants of functions and methods, finds out which of a file's tests (`tests.mutants.table.TESTS`) reach
which of them, and runs these on each mutant in a process of its own, until one fails. It works on a copy of the tree.

    python -m tests.mutants.run --rooms core,pruners,engine --sample 200 --seed 0

The report names each survivor by file and line, before and after. What no test could tell apart is no survivor: it
stands in `tests.mutants.table.EQUIVALENT`, with the reason. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import fnmatch
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.stats import status_by_exit_code

from tests.mutants.table import EQUIVALENT, TESTS

ROOT = Path(__file__).parents[2]
COPIED = ("src", "tests", "docs", "recipes", "bench", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "pyproject.toml")
NOTICED = ("killed", "timeout", "segfault")  # in mutmut's words
SETTINGS = """
[tool.mutmut]
source_paths = ["src"]
only_mutate = {only}
also_copy = ["docs", "recipes", "bench", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
pytest_add_cli_args = ["-k", "not compiled"]  # in a process of its own, which mutmut does not know
pytest_add_cli_args_test_selection = {tests}
timeout_multiplier = 3.0
timeout_constant = 5.0
"""


@dataclass(frozen=True)
class Mutant:
    """One fault: its file below the package, mutmut's name for it, and the line that it changes, before and after."""

    file: str
    name: str
    line: int
    before: str
    after: str

    @property
    def change(self) -> str:
        return f"{self.before} → {self.after}"

    @property
    def excuse(self) -> str | None:
        """Why no test could notice, None where one could."""
        rules = (
            why for file, like, why in EQUIVALENT if fnmatch.fnmatch(self.file, file) and re.search(like, self.change)
        )
        return next(rules, None)


def mutants_of(file: str) -> Iterator[Mutant]:
    """All mutants of a file."""
    source = (ROOT / "src/vlmflow" / file).read_text()
    made = mutate_file_contents(file, source)
    lines, starts = made.code.splitlines(), dict(_starts(ast.parse(source)))

    def function(name: str) -> list[str]:
        span = made.line_span_by_function_name[name]
        code = [line for line in lines[span.start - 1 : span.end] if "_mutmut_mutated" not in line]
        return [line.replace(name, name.rpartition("__mutmut_")[0]) for line in code]

    for name in made.mutant_names:
        whole = name.rpartition("__mutmut_")[0]
        changes = difflib.SequenceMatcher(None, was := function(f"{whole}__mutmut_orig"), now := function(name))
        tag, *where = max(changes.get_opcodes(), key=lambda change: change[0] != "equal")
        assert tag != "equal", name
        before, after = (
            "⏎".join(map(str.strip, part)) for part in (was[where[0] : where[1]], now[where[2] : where[3]])
        )
        yield Mutant(file, name, starts[whole] + where[0], before, after)


def _starts(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """The line on which each function begins, with its decorators, by what mutmut calls it."""
    for node in tree.body:
        inside, form = (node.body, f"xǁ{node.name}ǁ{{}}") if isinstance(node, ast.ClassDef) else ([node], "x_{}")
        for function in inside:
            if isinstance(function, ast.FunctionDef):
                yield form.format(function.name), min(n.lineno for n in (function, *function.decorator_list))


def tried(tree: Path, tests: Sequence[str], mutants: Sequence[Mutant]) -> dict[Mutant, str]:
    """What became of mutants of files with the same tests, in mutmut's words."""
    shutil.rmtree(tree / "mutants", ignore_errors=True)
    (tree / "mutants/src").mkdir(parents=True)  # Python remembers of a folder on its path that it is not there
    files = sorted({mutant.file for mutant in mutants})
    settings = SETTINGS.format(only=json.dumps([f"src/vlmflow/{file}" for file in files]), tests=json.dumps([*tests]))
    (tree / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + settings)
    command = [str(Path(sys.executable).with_name("mutmut")), "run", "--max-children", "1"]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tree}/mutants/src:{tree}/mutants", "COLUMNS": "80"}
    run = subprocess.run(
        [*command, *map(_full_name, mutants)],
        cwd=tree,
        env=os.environ | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if run.returncode:
        print(f"{', '.join(files)}: the tests do not run\n{run.stdout[-3000:]}", file=sys.stderr)
    codes = {}
    for file in files:
        found = tree / f"mutants/src/vlmflow/{file}.meta"
        codes |= json.loads(found.read_text())["exit_code_by_key"] if found.exists() else {}
    return {mutant: status_by_exit_code[codes.get(_full_name(mutant))] for mutant in mutants}


def _full_name(mutant: Mutant) -> str:
    return f"vlmflow.{mutant.file.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}.{mutant.name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooms", default="core,pruners,engine", help="of src/vlmflow, or files: core/cost.py")
    parser.add_argument("--sample", type=int, default=200, help="how many mutants, drawn from all of these rooms")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    files = [
        file for file in TESTS if any(file == room or file.startswith(f"{room}/") for room in given.rooms.split(","))
    ]
    everyone = [mutant for file in files for mutant in mutants_of(file)]
    drawn = random.Random(given.seed).sample(everyone, min(given.sample, len(everyone)))
    by_tests: dict[tuple[str, ...], list[Mutant]] = {}
    for mutant in drawn:
        if mutant.excuse is None:
            by_tests.setdefault(TESTS[mutant.file], []).append(mutant)
    became: dict[Mutant, str] = {}
    with tempfile.TemporaryDirectory() as place:
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, Path(place) / name)
        for tests, mutants in sorted(by_tests.items()):
            became |= tried(Path(place), tests, mutants)
            for mutant in mutants:
                if became[mutant] not in NOTICED:
                    print(f"{became[mutant]}: {mutant.file}:{mutant.line}  {mutant.change}", flush=True)
    counts = Counter(became.values())
    decided = len(became) - counts["not checked"]
    noticed = sum(counts[word] for word in NOTICED)
    found = {"mutants": len(everyone), "tried": decided, "equivalent": len(drawn) - len(became), **counts}
    print(json.dumps({**vars(given), **found, "share_noticed": round(noticed / max(1, decided), 4)}))
    sys.exit(decided < len(became))


if __name__ == "__main__":
    main()
