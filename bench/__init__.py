"""What the package costs, measured: each script writes files that ``docs/make`` turns into pages.

Run them from the root of the repository: ``python -m bench.cpu``, ``.gpu``, ``.saliency``, ``.results``.
"""

from pathlib import Path

ROOT = Path(__file__).parents[1]
