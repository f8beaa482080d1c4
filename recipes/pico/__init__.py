"""Pico's recipe: what makes the weights, the samples and the record of how far they came. None of it is shipped.

Run it from the root of the repository: ``python -m recipes.pico.train``, ``.export``, ``.score_card``, ``.glyphs``.
"""

from pathlib import Path

RECORD = Path(__file__).parent  # training.jsonl, curves.png and results.json of the shipped weights
