"""The examples in docstrings run, and what is used most has one."""

import subprocess
import sys
from pathlib import Path

import pytest

import vlmflow
from vlmflow import Knockout, Layout, Pruner, Trace, attach, make_pruner, prune, saliency
from vlmflow.core.cost import cost_of
from vlmflow.core.geometry import Geometry
from vlmflow.models import ask, load

SOURCE = Path(vlmflow.__file__).parent
MOST_USED = [
    *(attach, prune, Trace.cost, Layout.read, Knockout, saliency, load, ask, cost_of),
    *(Pruner.cost, make_pruner, Geometry.from_config),
]

# In a process of its own, as doctest does not see what the type checker has wrapped. Where an example needs a model,
# `model`, `processor` and `inputs` stand for those of any Hugging Face model: here the embedded one's, about a picture.
RUN = """
import doctest, importlib, sys
from vlmflow import FastV, HiMAP, attach, prune
from vlmflow.models import Question, load, open_image
from vlmflow.pico import samples

vlm = load("pico", "cpu")
inputs = vlm.encode([Question("What color is the rook?", (open_image(samples()[0].image),))])
names = dict(FastV=FastV, HiMAP=HiMAP, attach=attach, prune=prune)
names |= dict(model=vlm.model, processor=vlm.processor, inputs=inputs)
for module in sys.argv[1:]:
    doctest.testmod(importlib.import_module(module), extraglobs=names)
sys.exit(doctest.master.failures > 0)
"""


@pytest.mark.parametrize("public", MOST_USED, ids=lambda public: public.__qualname__)
def test_what_is_used_most_has_an_example(public):
    assert ">>> " in public.__doc__


def test_examples_in_docstrings_run():
    with_examples = [path.relative_to(SOURCE.parent) for path in SOURCE.rglob("*.py") if ">>> " in path.read_text()]
    modules = sorted(".".join(path.with_suffix("").parts) for path in with_examples)
    run = subprocess.run([sys.executable, "-c", RUN, *modules], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
