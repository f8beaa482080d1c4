"""Shapes and types in annotations are checked at run time, under pytest only."""

import torch
from jaxtyping import install_import_hook

install_import_hook("vlmflow", "beartype.beartype")
torch.set_num_threads(1)
