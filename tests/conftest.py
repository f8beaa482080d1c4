"""Shapes and types in annotations are checked at run time, under pytest only.

``VLMFLOW_DEVICE=cuda`` runs the suite there: `tiny` puts its models and samples on that device, and tests follow them.
"""

import os

import beartype
import torch
from jaxtyping import install_import_hook

os.environ["HF_HUB_OFFLINE"] = "1"  # the suite needs no network, and must not wait for one
checked = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))  # a whole number is a float
# Not by jaxtyping's option --jaxtyping-packages: beside a checker with settings it checks one package and skips others.
install_import_hook(["vlmflow", "recipes"], "conftest.checked")
torch.set_num_threads(1)
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # the tolerances are float32's
