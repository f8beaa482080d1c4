"""What is read from files that others wrote: one line with file, place and what to do, whatever is in them."""

import errno
import json
import os
from pathlib import Path

import pytest

from vlmflow.evaluate.rows import Row, verdicts_of
from vlmflow.evaluate.tables import find_results
from vlmflow.records.files import RecordError, parse_json, write_json
from vlmflow.records.folder import Folder, RowFile, claim
from vlmflow.records.schema import StudyRow

ROW = {
    "id": "a",
    "prompt": "?",
    "answer": "yes",
    "parsed": "yes",
    "score": 1.0,
    "answer_tokens": 1,
    "tokens": 9,
    "question_tokens": 2,
    "image_tokens": {"0": 6, "1": 3},
    "cost": None,
    "sample": {},
}
STUDY_ROW = StudyRow("a", ("a.png",), lengths={"image": 3}, found={"flow": [0.5]}).to_dict()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000, "line 7: JSON that cannot be read"),
        ("1" * 5_000, "line 7: JSON that cannot be read"),
        ('{"a": 1, "a": 2}', "holds 'a' twice"),
        ('{"a":\n"\\uD83D"}', r"line 8: holds half a character \(\\ud83d\)"),
        ('{"\\udc00": 1}', "line 7: holds half a character"),
    ],
    ids=["deep", "digits", "twice", "half", "half a key"],
)
def test_json_that_cannot_be_used_is_refused_with_its_place(tmp_path, text, says):
    with pytest.raises(RecordError, match=says) as error:
        parse_json(text, tmp_path / "a.json", 7)
    assert str(tmp_path / "a.json") in str(error.value)


def test_whole_characters_are_read(tmp_path):
    assert parse_json('["\\ud83d\\ude00", "\\\\ud83d"]', tmp_path) == ["\U0001f600", "\\ud83d"]


@pytest.mark.parametrize("kind", [Row, StudyRow])
def test_rows_come_back_as_they_were_written(tmp_path, kind):
    record = ROW if kind is Row else STUDY_ROW
    file = RowFile(tmp_path / "rows.jsonl", kind)
    file.append([kind.from_dict(record)])
    assert json.loads(file.path.read_text()) == json.loads(json.dumps(record))
    assert file.read() == {"a": kind.from_dict(record)}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *((Row, {"image_tokens": value}) for value in ({}, {"1": 3}, {"x": 1}, 5, None, {"0": "many"})),
        *((Row, {name: value}) for name, value in (("tokens", "x"), ("answer", None), ("score", []), ("sample", 3))),
        *((StudyRow, {name: value}) for name, value in (("images", None), ("lengths", [1]), ("target", "x"))),
    ],
)
def test_rows_of_another_making_are_refused_by_line(tmp_path, kind, changes):
    record = ROW if kind is Row else STUDY_ROW
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(record) + "\n" + json.dumps({**record, **changes}) + "\n")
    with pytest.raises(RecordError, match=r"rows.jsonl, line 2: not a row .* take the line out"):
        RowFile(path, kind).read()


@pytest.mark.parametrize("line", ["[" * 100_000, "1" * 5_000, "3", "null"], ids=["deep", "digits", "3", "null"])
def test_a_line_that_is_no_row_is_refused_by_its_number(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(RecordError, match="line 1: not a row"):
        RowFile(path, Row).read()


SUMMARY = {
    "settings": {},
    "metric": None,
    "judge": None,
    "samples": {"asked": 1, "answered": 1, "failed": 0},
    "failed": {},
    "answer_tokens": 1.0,
    "tokens": 2.0,
    "image_tokens": [1.0],
    "cost": None,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"settings": {"model": "m", "task": "pico", "pruner": 3}},
        {"settings": {"model": "m", "task": "pico", "pruner": {"name": "x"}}, "cost": {"table": {}}},
        {"settings": [1]},
        {"format": "new"},
    ],
)
def test_a_summary_of_another_making_is_refused_by_its_file(tmp_path, changes):
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "summary.json").write_text(json.dumps({**SUMMARY, **changes}))
    with pytest.raises(RecordError, match=r"summary\.json: "):
        find_results([tmp_path])


@pytest.mark.parametrize("record", [{}, {"verdicts": [], "judge": {}}, {"verdicts": {}, "judge": 3}])
def test_verdicts_of_another_making_are_refused(tmp_path, record):
    (tmp_path / "verdicts.json").write_text(json.dumps(record))
    with pytest.raises(RecordError, match=r"verdicts.json: holds no judge's verdicts; take it away"):
        verdicts_of(Folder(tmp_path))


@pytest.fixture
def full(monkeypatch):
    """A disk without room, as is found out when what was written is to be kept."""

    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_is_named_and_nothing_half_written_is_left(tmp_path, full):
    says = r"cannot be written \(No space left on device\); make room there"
    (tmp_path / "a.json").write_text("before")
    with pytest.raises(RecordError, match=f"a.json: {says}"):
        write_json(tmp_path / "a.json", {})
    with pytest.raises(RecordError, match=f"rows.jsonl: {says}"):
        RowFile(tmp_path / "rows.jsonl", Row).append([Row.from_dict(ROW)])
    assert (tmp_path / "a.json").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "rows.jsonl"]


@pytest.mark.parametrize(("whose", "step"), [(Path, "write_text"), (os, "fsync"), (Path, "replace")])
def test_a_writer_that_is_stopped_between_its_steps_changes_nothing(tmp_path, monkeypatch, whose, step):
    """Nothing is put in its place before all of it is on disk."""
    write_json(tmp_path / "a.json", {"old": 1})
    steps, before = [], {name: getattr(place, name) for place, name in ((os, "fsync"), (Path, "replace"))}

    def noted(name):
        return lambda *given: steps.append(name) or before[name](*given)

    monkeypatch.setattr(os, "fsync", noted("fsync"))
    monkeypatch.setattr(Path, "replace", noted("replace"))
    write_json(tmp_path / "b.json", {})
    assert steps == ["fsync", "replace"]

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(whose, step, stop)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "a.json", {"new": 2})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"old": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_what_a_killed_process_has_left_is_cleared_away(tmp_path):
    (tmp_path / ".summary.json.12-34.partial").write_text("{")
    with claim(tmp_path, {}):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "settings.json"]
