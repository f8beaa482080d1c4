"""Write the JSON Schema of what the commands write: ``python -m docs.make.schema``."""

from __future__ import annotations

from typing import Any

from docs.make.page import ROOT
from vlmflow.flow.table import EXPERIMENTS
from vlmflow.records.files import write_json
from vlmflow.records.schema import RECORDS, json_schema

PATH = ROOT / "docs" / "schema.json"


def schema() -> dict[str, Any]:
    """The records that all commands share, and each study's summary."""
    return json_schema([*RECORDS, *(experiment.summary_type for experiment in EXPERIMENTS.values())])


if __name__ == "__main__":
    write_json(PATH, schema())
