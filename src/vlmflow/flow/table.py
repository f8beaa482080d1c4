"""The experiments by name; each is a command, ``vlmflow flow NAME``. Importing them loads no torch."""

from __future__ import annotations

from vlmflow.flow.contributions import ByLayer
from vlmflow.flow.windows import ByWindow

EXPERIMENTS = {experiment.name: experiment for experiment in (ByLayer, ByWindow)}
