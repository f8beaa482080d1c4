"""Write the JSON Schema of what the commands write: ``python -m docs.make.schema``."""

from __future__ import annotations

from docs.make.page import ROOT
from vlmflow.records.files import write_json
from vlmflow.records.schema import json_schema

PATH = ROOT / "docs" / "schema.json"


if __name__ == "__main__":
    write_json(PATH, json_schema())
