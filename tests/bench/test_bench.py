"""The benchmarks run, at a size of seconds, and the page of figures says what their files say."""

import json
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from bench import cpu, results, stages
from docs.make import performance
from docs.make import results as results_pages
from docs.make.page import put
from vlmflow.evaluate.rows import Row, rows_of
from vlmflow.records.folder import Folder
from vlmflow.tasks import Sample


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("performance")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["cpu.py", "--dry", "--out", str(folder)])
        stages.main("cpu", cpu.STAGES, cpu.__doc__)
    return folder


def test_every_stage_writes_its_file(files):
    assert {path.stem for path in files.iterdir()} == {f"cpu-{stage}" for stage in cpu.STAGES}
    record = json.loads((files / "cpu-prefill-7b-bfloat16.json").read_text())
    assert record["dtype"] == "bfloat16"
    (point,) = record["points"]
    assert list(point["methods"]) == ["none", "himap"]
    assert point["methods"]["none"]["promised"] == 1 < point["methods"]["himap"]["promised"]
    assert min(point["bare_seconds"].values()) > 0
    assert 0 < record["engine_seconds"] < 1
    (peers,) = json.loads((files / "cpu-prefill-peers.json").read_text())["points"]
    assert list(peers["methods"]) == ["none", "himap", "fastv", "vtw", "pyramiddrop"]
    assert 0 < json.loads((files / "cpu-decode.json").read_text())["hook_seconds"] < 1


THEIRS = """
def sdpa_attention_forward(): wait(100)
def layer(): wait(10); score(); wait(10)
"""
ENGINE = """
def hook(): wait(1); sdpa_attention_forward(); select(); layer()
def select(): wait(2)
def score(): wait(4)
"""


def test_the_engines_clock_stands_still_in_kernels(tmp_path, monkeypatch):
    """Of a call into the engine's folder everything counts, what it calls too, but for the model's attention kernel."""
    now = [0.0]
    scope = {"wait": lambda seconds: now.__setitem__(0, now[0] + seconds)}
    exec(THEIRS, scope)
    exec(compile(ENGINE, str(tmp_path / "engine.py"), "exec"), scope)
    monkeypatch.setattr(cpu, "ENGINE", str(tmp_path))
    monkeypatch.setattr(cpu, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    clock = cpu.EngineClock()
    sys.setprofile(clock)
    scope["layer"]()
    scope["hook"]()
    sys.setprofile(None)
    assert clock.seconds == 4 + (1 + 2 + 10 + 4 + 10)


def test_a_dry_run_is_no_result(files):
    page = "\n".join(f"<!-- begin {name} -->\nold\n<!-- end {name} -->" for name in performance.BLOCKS)
    filled = performance.filled(page, files)
    assert "old" not in filled
    assert filled.count("Never run") == len(performance.BLOCKS)


def test_the_page_is_written_from_the_files(files, tmp_path):
    for path in files.iterdir():
        record = json.loads(path.read_text())
        (tmp_path / path.name).write_text(json.dumps(record | {"dry": False}))
    record = json.loads((tmp_path / "cpu-decode.json").read_text())
    himap = record["points"][0]["methods"]["himap"]
    himap["seconds"]["tpot"], himap["speedup"]["tpot"] = 0.0123, {"value": 1.5, "low": 1.4, "high": 1.6}
    (tmp_path / "cpu-decode.json").write_text(json.dumps(record))
    page = "\n".join(f"<!-- begin {name} -->\nold\n<!-- end {name} -->" for name in performance.BLOCKS)
    filled = performance.filled(page, tmp_path)
    assert "| himap | 12.3 ms | 1.50 (1.40 to 1.60) |" in filled
    assert "Batch 1, 16 image tokens, 1 rounds:" in filled
    assert "| 8 x 80 (1) | himap |" in filled
    assert "`python -m bench.cpu decode`" in filled
    assert performance.filled(filled, tmp_path) == filled
    performance.picture(tmp_path, tmp_path / "promises.png")
    with Image.open(tmp_path / "promises.png") as picture:
        picture.load()
    with pytest.raises(SystemExit, match="must have one block"):
        performance.filled(page.replace("<!-- end cpu-decode -->", ""), tmp_path)


def test_the_page_in_the_documentation_is_up_to_date():
    page = performance.PAGE.read_text()
    assert performance.filled(page, performance.PAGE.with_suffix("")) == page


def test_answers_of_two_sweeps_are_compared_by_question(tmp_path):
    for sweep, answers in (("batched", {"a": "yes", "b": "no", "c": "red"}), ("alone", {"a": "yes", "b": "yes"})):
        folder = tmp_path / sweep / "himap-0.5"
        folder.mkdir(parents=True)
        (folder / "settings.json").write_text("{}")
        rows_of(Folder(folder)).append([Row(Sample(name, ()), "?", answer=said) for name, said in answers.items()])
    found = results.agreement(tmp_path / "batched", tmp_path / "alone")
    assert found == {"himap-0.5": {"asked": 2, "other": ["b"]}}


def test_the_pages_of_results_are_up_to_date():
    for path, blocks in results_pages.pages().items():
        page = path.read_text()
        for name, body in blocks.items():
            assert put(page, name, body) == page
