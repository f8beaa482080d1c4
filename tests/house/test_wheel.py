"""What is installed: the package with the embedded model and its world, and nothing that made them."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vlmflow.pico import samples

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    """The files of a wheel, made of a copy of what it is made of: setuptools leaves its traces beside its sources."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("src", "recipes", "bench", "docs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tree / "dist", tree]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (file,) = (tree / "dist").iterdir()
    return set(zipfile.ZipFile(file).namelist())


def test_it_holds_the_embedded_model_and_its_world(wheel):
    shipped = {name.removeprefix("vlmflow/pico/") for name in wheel if name.startswith("vlmflow/pico/")}
    assert {"weights/model.safetensors", "weights/config.json", "weights/tokenizer.json"} <= shipped
    assert {"__init__.py", "scenes.py", "questions.py", "glyphs.png", "samples/samples.json"} <= shipped
    assert {f"samples/{sample.image.name}" for sample in samples()} <= shipped
    assert "vlmflow/py.typed" in wheel
    assert any(name.endswith("licenses/src/vlmflow/pico/DEJAVU_LICENSE") for name in wheel)


def test_it_holds_nothing_that_made_them(wheel):
    assert {name.partition("/")[0].partition("-")[0] for name in wheel} == {"vlmflow"}
    code = {name for name in wheel if name.startswith("vlmflow/pico/") and name.endswith(".py")}
    assert code == {f"vlmflow/pico/{name}.py" for name in ("__init__", "questions", "scenes")}
    assert not {Path(name).name for name in wheel} & {"training.jsonl", "curves.png", "results.json"}
