"""Run vlmflow's commands in this process, as a user would type them; and a method in a file of its own."""

import re
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

from vlmflow.cli import app
from vlmflow.pico import samples

ROOT = Path(__file__).parents[1]
SCENE = samples()[0]
ASK = ["--prompt", SCENE.questions[0].text]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
NORM = re.search(r"```python\n(.*?)```", CONTRIBUTING, re.DOTALL).group(1)  # the file that it shows


@dataclass(frozen=True)
class Finished:
    """A command that has run."""

    returncode: int
    stdout: str
    stderr: str


def vlmflow(*args) -> Finished:
    """Run the command in this process; an error that is no refusal is raised."""
    done = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "80"}, catch_exceptions=False)
    return Finished(done.exit_code, done.stdout, done.stderr)


def refused(run):
    """One line on stderr, exit code 2, nothing on stdout; returns the line."""
    assert run.returncode == 2, run.stderr
    assert run.stdout == ""
    (line,) = run.stderr.strip().split("\n")
    assert "Traceback" not in line
    return line
