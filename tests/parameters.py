"""What the laws are held over: families, kernels, pruners."""

import pytest

import tiny
from vlmflow import VTW, FastV, HiMAP, PyramidDrop, Random, Uniform

PRUNERS = [
    HiMAP(2, 0.5, 4, 0.75),
    HiMAP(1, 0.3, 2, 0.5),  # inside the layers that deepstack models feed
    FastV(2, 0.6),
    PyramidDrop((1, 3, 5), 0.5),
    VTW(3),
    Random(2, 0.5, seed=1),
    Uniform(3, 0.6),
]
KERNELS = ["sdpa", "eager"]

families = pytest.mark.parametrize("family", tiny.FAMILIES)
kernels = pytest.mark.parametrize("attn", KERNELS)
pruners = pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
