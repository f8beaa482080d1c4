"""What commands write is read back by the types that wrote it, and the published schema is theirs."""

import json

import pytest

from docs.make.schema import PATH, schema
from vlmflow.core.cost import cost_of
from vlmflow.core.geometry import GEOMETRIES
from vlmflow.records.files import RecordError, write_json
from vlmflow.records.schema import (
    FORMAT,
    AnswerRecord,
    CostRecord,
    Line,
    MethodRun,
    RunRecord,
    SeenImages,
    SweepRecord,
    from_json,
    read_record,
    to_json,
)

COST = CostRecord.of(cost_of(GEOMETRIES["llava-1.5-7b"], (576,) * 2 + (288,) * 30, 60))
RUN = RunRecord(
    model="m",
    prompt="?",
    images=["a.png"],
    versions={"vlmflow": "0"},
    runs={"fastv": MethodRun({"name": "fastv", "k": 2}, AnswerRecord("yes", 1), [576] * 32, {"2": [0, 5]}, COST)},
    seen=SeenImages([(30, 20)], [4, 5, 6], [(1, 3)]),
)


def test_the_published_schema_is_that_of_the_types():
    """``python -m docs.make.schema`` writes it anew."""
    assert json.loads(PATH.read_text()) == schema()


@pytest.mark.parametrize("record", [RUN, SweepRecord({"seed": 0}, [Line("m", "t", "none", "", None, "f", value=0.5)])])
def test_records_come_back_as_they_were(tmp_path, record):
    write_json(tmp_path / "record.json", to_json(record))
    assert read_record(type(record), tmp_path / "record.json") == record


def test_records_without_a_format_are_read():
    """As those that were written before it."""
    old = {name: value for name, value in to_json(RUN).items() if name not in ("seen", "format")}
    assert from_json(RunRecord, old, "old.json").seen is None


def test_unknown_fields_are_no_hindrance():
    assert from_json(RunRecord, to_json(RUN) | {"later": 1}, "x.json") == RUN


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": 3}, r"x\.json: model of a RunRecord is wrong \(Input should be a valid string\)"),
        ({"runs": {"fastv": {}}}, r"x\.json: runs\.fastv\.pruner of a RunRecord is wrong \(Field required\)"),
        ({"format": FORMAT + 1}, r"x\.json: written in format 2 by a newer vlmflow"),
    ],
)
def test_what_is_no_such_record_is_refused(change, says):
    with pytest.raises(RecordError, match=says):
        from_json(RunRecord, to_json(RUN) | change, "x.json")
