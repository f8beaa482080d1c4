"""How a process ends that was stopped, or ran into what nobody has foreseen: one line, and never half a file."""

import os
import signal
import subprocess
import sys
import time

import pytest

from vlmflow import __main__, cli


@pytest.fixture
def escaping(monkeypatch):
    """A command that runs into an error of no kind that is refused."""

    def command():
        try:
            _ = {}["key"]
        except KeyError as error:
            raise RuntimeError("first line\nsecond line") from error

    monkeypatch.setattr(cli, "main", command)
    monkeypatch.setattr(signal, "signal", lambda *_: None)


def end(capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    return ended.value.code, capsys.readouterr().err


def test_what_escapes_is_told_in_one_line(escaping, capsys, monkeypatch):
    monkeypatch.delenv("VLMFLOW_TRACEBACK", raising=False)
    code, said = end(capsys)
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith("vlmflow: RuntimeError: first line; ")
    assert "VLMFLOW_TRACEBACK=1" in said


def test_a_traceback_is_shown_where_it_is_asked_for(escaping, capsys, monkeypatch):
    monkeypatch.setenv("VLMFLOW_TRACEBACK", "1")
    code, said = end(capsys)
    assert code == 2
    assert "KeyError: 'key'" in said
    assert said.rstrip().split("\n")[-1].startswith("vlmflow: RuntimeError")


@pytest.mark.parametrize("args", [["--traceback", "cost", "--pruner", "nope"], ["cost", "--pruner", "nope"]])
def test_the_option_shows_where_a_refusal_comes_from(args):
    run = subprocess.run([sys.executable, "-m", "vlmflow", *args], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "unknown pruner 'nope'" in run.stderr
    assert ("Traceback" in run.stderr) == ("--traceback" in args)


@pytest.mark.parametrize(
    ("number", "after"), [(signal.SIGINT, 0.2), (signal.SIGINT, 2), (signal.SIGTERM, 1), (signal.SIGTERM, 5)]
)
def test_a_process_that_is_stopped_says_so_in_one_line(tmp_path, number, after):
    """While it imports, while it loads the model, while it answers."""
    args = ["eval", "--task", "pico", "--batch-size", "1", "--device", "cpu", "--out", tmp_path / "out"]
    process = subprocess.Popen(
        [sys.executable, "-c", "import vlmflow.__main__ as m; print(flush=True); m.main()", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "80"},
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(after)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    told = [line for line in said.split("\n") if line.startswith("vlmflow: ")]
    assert told in (["vlmflow: stopped"], ["vlmflow: stopped; the same command continues from here"])
    assert "Traceback" not in said
    assert not [*tmp_path.rglob("*.partial")]
