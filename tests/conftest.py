"""Shapes and types in annotations are checked at run time, under pytest only."""

import beartype
import torch
from jaxtyping import install_import_hook

checked = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))  # a whole number is a float
install_import_hook("vlmflow", "conftest.checked")
torch.set_num_threads(1)
