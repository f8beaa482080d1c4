"""The pages keep their word: their code runs, the parsers read their commands, their links lead somewhere."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command

import vlmflow as package
from commands import NORM, SCENE, vlmflow
from vlmflow.cli import app
from vlmflow.models import Question, load, open_image

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
QUICK = ("run", "cost", "pruners", "models", "samples", "show")  # seconds each
ELSEWHERE = re.compile(r"-hf |Qwen/|--geometry|\$|^report")  # a hub model, 7 billion weights, a loop, or its results


def blocks(page: Path, language: str) -> list[str]:
    """The page's code in one language."""
    return [code for name, code in BLOCK.findall(page.read_text()) if name == language]


def lines(page: Path) -> list[list[str]]:
    """The commands of a page's shell blocks, word by word, without comments and the shell's own."""
    joined = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    words = [shlex.split(line, comments=True) for line in joined.split("\n")]
    return [line for line in words if line and line[0] not in ("for", "do", "done", "export")]


def parsed(args: list[str]) -> list[str]:
    """The names of the command that takes these words; whatever its parser refuses is raised."""
    command, names = get_command(app), []
    while isinstance(command, TyperGroup):
        name, *args = args
        command = command.commands[name]
        names.append(name)
    command.make_context(names[-1], [*args])
    return names


def all_lines(program: str) -> list[list[str]]:
    return [line for page in PAGES for line in lines(page) if line[0] == program]


def test_blocks_say_their_language():
    assert {name for page in PAGES for name, _ in BLOCK.findall(page.read_text())} == {
        *("bash", "python", "text", "toml", "bibtex")
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shell_blocks_are_shell(page):
    for code in blocks(page, "bash"):
        subprocess.run(["bash", "-n"], input=code, text=True, check=True)


def test_python_blocks_run():
    vlm = load("pico", "cpu")
    questions = [Question(question.text, (open_image(SCENE.image),)) for question in SCENE.questions[:2]]
    inputs = vlm.encode(questions[:1])
    found = [code for page in PAGES for code in blocks(page, "python")]
    assert len(found) == 3
    for code in found:
        names = {"vlmflow": package, "vlm": vlm, "model": vlm.model, "inputs": inputs, "questions": questions}
        exec(code, names)
        assert "trace" not in names or names["trace"].image_tokens[-1] == (72,)


def test_every_program_that_is_named_is_checked_here():
    named = {line[0] for page in PAGES for line in lines(page)}
    assert named == {"vlmflow", "torchrun", "lmms-eval", "pip", "make", ".venv/bin/python", ".venv/bin/pre-commit"} | {
        "VLMFLOW_DEVICE=cuda"
    }


def test_our_commands_are_read_by_their_parsers():
    given = [line[1:] for line in all_lines("vlmflow")]
    given += [line[line.index("vlmflow") + 1 :] for line in all_lines("torchrun")]
    assert len(given) > 25
    assert {parsed(args)[0] for args in given} >= {"run", "cost", "bench", "eval", "sweep", "flow", "report", "samples"}


def test_commands_that_need_no_download_run(tmp_path, monkeypatch):
    """In the pages' order; of those that take minutes one of each name, on two samples."""
    monkeypatch.chdir(tmp_path)
    Path("norm.py").write_text(NORM)
    Path("my_method.py").write_text(NORM.replace("Norm", "MyMethod"))
    ran = []
    for _, *args in all_lines("vlmflow"):
        name = parsed(args)[-1]
        if ELSEWHERE.search(" ".join(args)) or (name in ran and name not in QUICK):
            continue
        ran.append(name)
        if name not in QUICK:
            place = args.index("--limit") if "--limit" in args else len(args)
            args[place : place + 2] = ["--limit", "2"]
        run = vlmflow(*args)
        assert run.returncode == 0, f"{args}: {run.stderr}"
    assert {*ran} == {*QUICK, "sweep", "saliency", "knockout"}


def test_extras_targets_and_files_that_are_named_are_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {re.fullmatch(r"vlmflow\[([\w-]+)\]|\.", line[2]).group(1) for line in all_lines("pip")} <= {None, *extras}
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {target for line in all_lines("make") for target in line[1:]} <= {*targets}
    for line in all_lines(".venv/bin/python"):
        assert (ROOT / line[3].partition("::")[0]).is_file()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text())):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file) if file else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"
