"""Seeded cases of bad input, each a command line: ``make fuzz`` runs hundreds, the suite a small sample.

A case either works (exit code 0, or 1 where every sample failed) or is refused: exit code 2, at most three lines, no
traceback, no file half written, and all within 30 seconds.

    python -m tests.fuzz.fuzz --cases 500 --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from vlmflow import __main__ as entry
from vlmflow.pico import MODEL_DIR, samples

LONGEST = 30  # seconds
SCENE = samples()[0]
ODD = [
    "",
    " ",
    "-1",
    "0",
    "1e999",
    "nan",
    "9" * 400,
    "9" * 5000,
    "4000000000",
    "\udcff",
    "\x00",
    "ключ",
    "a,b",
    "../..",
    "{",
    "null",
]
ODD_JSON = [None, True, -1, 0, 1e308, 10**400, "", "\ud800", [], {}, [[]], "x" * 10_000, {"a": {"b": []}}]
OPTIONS = {
    "cost": ["--model", "--pruner", "--set", "--image-tokens", "--text-tokens"],
    "run": ["--image", "--prompt", "--model", "--pruner", "--set", "--max-new-tokens", "--dtype", "--device", "--save"],
    "eval": [
        "--task",
        "--model",
        "--pruner",
        "--set",
        "--limit",
        "--batch-size",
        "--rule",
        "--prompt-style",
        "--source",
    ],
    "sweep": ["--task", "--pruners", "--budgets", "--limit", "--rule"],
    "bench": ["--pruners", "--batch-size", "--new-tokens", "--protocol", "--geometry", "--save"],
    "flow saliency": ["--task", "--samples", "--seed", "--limit", "--layers", "--sources"],
    "flow show": ["--image", "--prompt", "--layers", "--model"],
}
Case = tuple[list[str], str]  # the arguments, and what was done to what they name


def needed(command: str, place: Path) -> dict[str, str]:
    """The options without which a command is refused for that alone."""
    image, out = {"--image": str(SCENE.image), "--prompt": "What?"}, {"--out": str(place / "out")}
    task = {"--task": "pico", "--limit": "1", **out}
    return {
        "run": {**image, "--max-new-tokens": "1"},
        "eval": {**task, "--max-new-tokens": "1"},
        "sweep": task,
        "flow saliency": task,
        "flow show": {**image, **out},
        "bench": {"--repeats": "1", "--new-tokens": "1", "--pruners": "vtw"},
    }.get(command, {})


def odd_option(chance: random.Random, place: Path) -> Case:
    """A command with one option of a value that it has not seen."""
    command = chance.choice([*OPTIONS])
    option, value = chance.choice(OPTIONS[command]), chance.choice(ODD)
    options = {**needed(command, place), option: value}
    return [*command.split(), *(part for pair in options.items() for part in pair)], f"{option} {value[:20]!a}"


def odd_config(chance: random.Random, place: Path) -> Case:
    """A model one of whose settings is nonsense, or one of whose files is cut."""
    folder = place / "model"
    shutil.copytree(MODEL_DIR, folder)
    name = chance.choice(
        ["config.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja", "tokenizer.json"]
    )
    file = folder / name
    what = spoil(chance, file)
    return [
        "run",
        "--model",
        str(folder),
        "--image",
        str(SCENE.image),
        "--prompt",
        "What?",
        "--max-new-tokens",
        "1",
    ], what


def odd_record(chance: random.Random, place: Path) -> Case:
    """Questions, or a result folder, of which one line or field is nonsense."""
    (place / "out").mkdir()
    question = {"image": str(SCENE.image), "question": "What?", "answer": "x", "id": "a"}
    file = place / "questions.jsonl"
    file.write_text(json.dumps(question) + "\n")
    task = ["eval", "--task", "jsonl", "--source", str(file), "--max-new-tokens", "1", "--out", str(place / "out")]
    kind = chance.choice(["questions", "summary.json", "rows.jsonl", "verdicts.json"])
    if kind == "questions":
        return task, spoil(chance, file)
    shutil.copytree(finished(), place / "out", dirs_exist_ok=True)
    (place / "out/verdicts.json").write_text('{"judge": {}, "verdicts": {}}')
    what = spoil(chance, place / "out" / kind)
    return ["report", str(place / "out")], what


def odd_picture(chance: random.Random, place: Path) -> Case:
    """A picture of which bytes are exchanged or cut off."""
    content = bytearray(SCENE.image.read_bytes())
    for _ in range(chance.choice([1, 10, 100])):
        content[chance.randrange(len(content))] = chance.randrange(256)
    file = place / "a.png"
    file.write_bytes(content[: chance.choice([len(content), chance.randrange(len(content))])])
    return ["run", "--image", str(file), "--prompt", "What?", "--max-new-tokens", "1"], "bytes of a picture"


KINDS: list[Callable[[random.Random, Path], Case]] = [odd_option, odd_option, odd_config, odd_record, odd_picture]


def spoil(chance: random.Random, file: Path) -> str:
    """Cut a file, exchange one of its characters, or set one of its fields to nonsense; what was done."""
    text = file.read_text()
    way = chance.choice(["cut", "character", "field", "field", "field"])
    if way == "cut":
        file.write_text(text[: chance.randrange(len(text))])
        return f"{file.name} cut"
    if way == "character" or file.suffix not in (".json", ".jsonl"):
        at = chance.randrange(len(text))
        file.write_text(text[:at] + chance.choice('{}[]",:x\\%0') + text[at + 1 :])
        return f"{file.name}: character {at}"
    record, value = json.loads(text), chance.choice(ODD_JSON)
    inner = record
    while nested := [held for held in inner.values() if isinstance(held, dict) and held]:
        if chance.random() < 0.4:
            break
        inner = chance.choice(nested)
    name = chance.choice([*inner])
    inner[name] = value
    file.write_text(json.dumps(record) + "\n")
    return f"{file.name}: {name} = {json.dumps(value)[:30]}"


_FINISHED: list[Path] = []


def finished() -> Path:
    """The folder of a run that has ended, made once."""
    if not _FINISHED:
        out = Path(tempfile.mkdtemp()) / "finished"
        code, said = run(["eval", "--task", "pico", "--limit", "1", "--max-new-tokens", "1", "--out", str(out)])
        assert code == 0, said
        _FINISHED.append(out)
    return _FINISHED[0]


def run(args: list[str]) -> tuple[object, str]:
    """Run a command in this process, as ``vlmflow`` would; its exit code, and what it said on stderr."""
    said = io.StringIO()
    quiet = (contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said))
    with quiet[0], quiet[1], mock.patch.object(sys, "argv", ["vlmflow", *args]), mock.patch.object(signal, "signal"):
        try:
            entry.main()
        except SystemExit as end:
            return end.code or 0, said.getvalue()
    return 0, said.getvalue()


class TooLong(BaseException):
    """A case that does not end."""


def _too_long(number: int, frame: Any) -> None:
    raise TooLong(f"{frame.f_code.co_filename}, line {frame.f_lineno}")


def flaw(case: Case, place: Path) -> str | None:
    """What is wrong with how a case ends, None where nothing is."""
    args, what = case
    start = time.perf_counter()
    try:
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(LONGEST)
        code, said = run(args)
    except TooLong as error:
        code, said = -1, f"it was here: {error}"
    finally:
        signal.alarm(0)
    lines = [line for line in said.split("\n") if line.strip()]
    wrong = {
        f"exit code {code}": code not in (0, 1, 2),
        "a traceback": "Traceback" in said,
        "not foreseen": "was not foreseen" in said,
        f"{len(lines)} lines": code == 2 and len(lines) > 3,
        f"{time.perf_counter() - start:.0f} s": time.perf_counter() - start > LONGEST,
        "a file half written": any(place.rglob("*.partial")),
    }
    found = [name for name, is_so in wrong.items() if is_so]
    return f"{' '.join(args)[:200]!a} ({what}): {', '.join(found)}: {said[-300:]!a}" if found else None


def cases(seed: int, count: int) -> list[str]:
    """The flaws of so many cases."""
    flaws = []
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(Path.cwd()):
            place = Path(folder) / "some/where"  # so deep that ``../..`` leads to nobody else's files
            place.mkdir(parents=True)
            os.chdir(place)
            if found := flaw(KINDS[number % len(KINDS)](chance, place), place):
                flaws.append(f"case {number}: {found}")
                print(flaws[-1], flush=True)
    return flaws


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    flaws = cases(asked.seed, asked.cases)
    print(f"{asked.cases} cases, {len(flaws)} flaws")
    sys.exit(bool(flaws))
