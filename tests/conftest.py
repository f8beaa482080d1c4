"""Shapes and types in annotations are checked at run time, under pytest only.

``VLMFLOW_DEVICE=cuda`` runs the suite there: `tiny` puts its models and samples on that device, and tests follow them.
"""

import inspect
import os
from typing import get_type_hints

import beartype
import jaxtyping
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # the suite needs no network, and must not wait for one
checked = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))  # a whole number is a float
with_shapes = jaxtyping.jaxtyped


def jaxtyped(*, typechecker):
    """What the import hook puts on functions: the check of shapes, which takes long, only where there are some."""
    return lambda fn: checked(fn) if beartype_is_enough(fn) else with_shapes(typechecker=typechecker)(fn)


def beartype_is_enough(fn) -> bool:
    """Whether no annotation has a shape (``Float[Tensor, 'batch heads']``) or a name that only type checkers import."""
    if not inspect.isfunction(fn) or any("'" in str(annotation) for annotation in fn.__annotations__.values()):
        return False
    try:
        get_type_hints(fn)
    except NameError:
        return False
    return True


jaxtyping.jaxtyped = jaxtyped
# Not by jaxtyping's option --jaxtyping-packages: beside a checker with settings it checks one package and skips others.
jaxtyping.install_import_hook(["vlmflow", "recipes"], "conftest.checked")
torch.set_num_threads(1)
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # the tolerances are float32's
