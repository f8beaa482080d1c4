"""A method that stands in a file of its own, in a module, or in an installed package works as vlmflow's own do."""

import json
import pickle
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import tiny
from commands import ASK, NORM, SCENE, refused, vlmflow
from vlmflow.evaluate.budgets import with_budget
from vlmflow.evaluate.sweep import plan
from vlmflow.models import Question, load, open_image
from vlmflow.models.ask import ask
from vlmflow.pruners import PRUNERS, HiMAP, Pruner, Stage, find_pruner, find_pruners, kept_after, make_pruner
from vlmflow.speed.latency import Request, compare

SMALL = ["--task", "pico", "--limit", "2", "--max-new-tokens", "2", "--batch-size", "2", "--device", "cpu"]


@pytest.fixture
def norm(tmp_path) -> Path:
    """The file that CONTRIBUTING.md shows."""
    file = tmp_path / "norm.py"
    file.write_text(NORM)
    return file


def last_line(run) -> dict:
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


# -- the file in the commands


def test_run(norm):
    settings = ["--set", "k=3", "--set", "ratio=0.75"]
    run = vlmflow("run", "--image", SCENE.image, *ASK, "--pruner", f"{norm}:Norm", *settings, "--json")
    (only,) = (runs := last_line(run)["runs"]).values()
    assert list(runs) == ["norm"]
    assert only["pruner"] == {"name": "norm", "k": 3, "ratio": 0.75}
    assert only["image_tokens"] == [576] * 3 + [144] * 7


def test_cost(norm):
    record = last_line(vlmflow("cost", "--pruner", f"{norm}:Norm", "--json"))
    assert record["pruner"] == {"name": "norm", "k": 2, "ratio": 0.5}
    assert record["schedule"] == [576] * 2 + [288] * 30
    assert record["cost"]["pruned"]["score_flops"] == 0


def test_eval(norm, tmp_path):
    """The record says which code it was; another one does not go on with its rows."""
    command = ["eval", *SMALL, "--pruner", f"{norm}:Norm", "--set", "k=3", "--out", tmp_path / "out", "--json"]
    settings = last_line(vlmflow(*command))["settings"]
    assert settings["pruner"] == {"name": "norm", "k": 3, "ratio": 0.5}
    origin = r"norm\.py, sha256 [0-9a-f]{12}; published defaults, scaled to 10 layers; set: k=3"
    assert re.fullmatch(origin, settings["pruner_from"])
    assert last_line(vlmflow(*command))["settings"] == settings
    norm.write_text(f"{NORM}# changed\n")
    changed = vlmflow(*command)
    assert changed.returncode == 2
    assert 'pruner_from was "norm.py, sha256' in changed.stderr


def test_sweep(norm, tmp_path):
    """It meets budgets without a word of its own, also one that wants an earlier layer."""
    methods = ["--pruners", f"fastv,{norm}:Norm", "--budgets", "0.5,0.15"]
    lines = last_line(vlmflow("sweep", *SMALL, *methods, "--out", tmp_path / "out", "--json"))["lines"]
    assert [line["folder"] for line in lines] == ["none", "fastv-0.5", "fastv-0.15", "norm-0.5", "norm-0.15"]
    none, *fastv, half, least = lines
    assert [line["mean_image_tokens"] for line in (half, least)] == [line["mean_image_tokens"] for line in fastv]
    assert half["mean_image_tokens"] == pytest.approx(none["mean_image_tokens"] / 2, abs=1)
    settings = json.loads((tmp_path / "out/norm-0.15/settings.json").read_text())
    assert settings["pruner"]["k"] == 1
    assert settings["pruner_from"].startswith("norm.py, sha256 ")


def test_bench(norm):
    record = last_line(vlmflow("bench", "--pruners", f"{norm}:Norm", "--new-tokens", "1", "--repeats", "1", "--json"))
    (point,) = record["points"]
    assert point["methods"].keys() == {"none", "norm"}
    assert point["methods"]["norm"]["pruner"] == {"name": "norm", "k": 2, "ratio": 0.5}


def test_another_process_runs_the_same_file(norm):
    """Which is how Ray's workers get it; a file that is another one there is refused."""
    pruner = make_pruner(f"{norm}:Norm", {"k": "3"}, 10)
    pickled = pickle.dumps(pruner)

    def told() -> subprocess.CompletedProcess:
        code = "import pickle, sys; print(pickle.load(sys.stdin.buffer))"
        return subprocess.run([sys.executable, "-c", code], input=pickled, capture_output=True)

    assert told().stdout.decode().strip() == "Norm(k=3, ratio=0.5)"
    norm.write_text(NORM.replace("hidden.norm", "hidden.abs().amax"))
    assert f"{norm} is not the file that it was where the run began" in told().stderr.decode()


# -- other ways to it


def test_a_module_that_python_finds(tmp_path, monkeypatch):
    (tmp_path / "found_by_python.py").write_text(NORM)
    monkeypatch.syspath_prepend(tmp_path)
    record = last_line(vlmflow("cost", "--pruner", "found_by_python:Norm", "--set", "k=4", "--json"))
    assert record["pruner"] == {"name": "norm", "k": 4, "ratio": 0.5}


def install(folder: Path, package: str, **names: str) -> None:
    """As pip would: the metadata of a package that offers methods by these names."""
    metadata = folder / f"{package}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {target}" for name, target in names.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[vlmflow.pruners]", *lines, ""]))


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Two packages with one sound method, and every way to get it wrong."""
    (tmp_path / "sound_methods.py").write_text(NORM)
    (tmp_path / "broken_methods.py").write_text("import no_such_thing\n")
    install(tmp_path, "sound", norm="sound_methods:Norm", other="sound_methods:Norm", twice="sound_methods:Norm")
    install(tmp_path, "broken", broken="broken_methods:Norm", gone="sound_methods:Gone", twice="broken_methods:Norm")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("installed")
def test_a_method_of_an_installed_package_has_a_name():
    assert last_line(vlmflow("cost", "--pruner", "norm", "--json"))["pruner"] == {"name": "norm", "k": 2, "ratio": 0.5}
    assert refused(vlmflow("cost", "--pruner", "nrm")).count("uniform, broken, gone, norm, other, twice, or") == 1


@pytest.mark.usefixtures("installed")
def test_the_list_shows_what_works_and_says_what_does_not():
    listed = vlmflow("pruners")
    assert listed.returncode == 0
    assert "norm" in listed.stdout
    assert "k=2, ratio=0.5" in listed.stdout
    assert all(name in listed.stdout for name in PRUNERS)
    assert listed.stderr.strip().split("\n") == [
        "left out: pruner broken of package broken cannot be imported: "
        "ModuleNotFoundError: No module named 'no_such_thing'",
        "left out: pruner gone of package broken cannot be imported: "
        "AttributeError: module 'sound_methods' has no attribute 'Gone'",
        "left out: pruner other of package sound: its class calls itself norm; the entry point must have that name",
        "left out: pruner twice: offered by broken, sound; uninstall all but one",
    ]
    assert "broken of package broken cannot be imported" in refused(vlmflow("cost", "--pruner", "broken"))


@dataclass(frozen=True)
class Middle(Pruner):
    """Written in a program, and nowhere else: keep the tokens of the middle."""

    k: int = 1
    ratio: float = 0.5

    def stages(self, n_layers, n_image):
        return (Stage(self.k, kept_after(n_image, self.ratio)),)

    def score(self, view):
        return -(view.ordinal - max(view.total) / 2).abs()


def test_a_class_in_a_program():
    vlm = load("pico", "cpu")
    (run,) = ask(vlm, [Question(SCENE.questions[0].text, (open_image(SCENE.image),))], Middle(), max_new_tokens=2)
    assert run.to_dict()["pruner"] == {"name": "middle", "k": 1, "ratio": 0.5}
    assert run.stages[1] == tuple(range(144, 432))
    small = tiny.build("llava")
    found = compare(small.model, Request(small.samples[0]), {"middle": Middle()}, repeats=1)
    assert found.methods["middle"].pruner["name"] == "middle"
    assert [cell.folder for cell in plan([HiMAP, Middle], [0.5], 10, "qa")] == ["none", "himap-0.5", "middle-0.5"]
    assert with_budget(Middle, 0.55, 10).ratio == pytest.approx(0.5)


# -- what is refused

BROKEN = {
    "syntax.py": "class Norm(:\n",
    "missing.py": "import no_such_thing\n",
    "two_lines.py": "raise RuntimeError('first\\nsecond')\n",
    "plain.py": "class Norm:\n    pass\n",
    "named.py": NORM.replace("k: int = 2", 'name = "fastv"\n    k: int = 2'),
    "slashed.py": NORM.replace("k: int = 2", 'name = "a/b"\n    k: int = 2'),
    "thawed.py": NORM.replace("(frozen=True)", ""),
    "needing.py": NORM.replace("k: int = 2", "k: int"),
    "stageless.py": NORM.replace("def stages", "def steps"),
    "untyped.py": NORM.replace("k: int = 2", "k: int | None = 2"),
    "switch.py": NORM.replace("k: int = 2", "k: int = 2\n    switch: bool = False"),
    "greedy.py": NORM,
}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("gone.py:Norm", "no file gone.py"),
        ("greedy.py", "unknown pruner 'greedy.py'; choose from"),
        ("greedy.py:Nrm", "greedy.py has no class 'Nrm'; its methods are Norm"),
        ("plain.py:Nrm", "plain.py has no class 'Nrm'; it has no method"),
        ("plain.py:Norm", "plain.py:Norm is no pruning method; it must be a class that derives from vlmflow.Pruner"),
        ("greedy.py:Pruner", "greedy.py:Pruner is no pruning method"),
        ("greedy.py:kept_after", "greedy.py:kept_after is no pruning method"),
        ("syntax.py:Norm", "syntax.py cannot be imported: SyntaxError: invalid syntax"),
        ("missing.py:Norm", "missing.py cannot be imported: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("two_lines.py:Norm", "two_lines.py cannot be imported: RuntimeError: first"),
        ("named.py:Norm", "named.py cannot be imported: ValueError: Norm: 'fastv' is one of vlmflow's own methods"),
        ("slashed.py:Norm", "name must be letters, digits, - and _, got 'a/b'"),
        ("thawed.py:Norm", "cannot inherit non-frozen dataclass from a frozen one"),
        ("needing.py:Norm", "needing.py:Norm: the field k needs a default"),
        ("stageless.py:Norm", "stageless.py:Norm does not say its stages"),
        ("no_such_module:Norm", "no module 'no_such_module'; a file is named as path/to/file.py:Class"),
        ("no_such_package.inside:Norm", "no module 'no_such_package.inside'"),
        ("missing:Norm", "missing cannot be imported: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("syntax:Norm", "syntax cannot be imported: SyntaxError: invalid syntax"),
        ("untyped.py:Norm --set k=3", "k is of a type that no text sets"),
        ("switch.py:Norm --set switch=1", "switch must be true or false, got '1'"),
        ("greedy.py:Norm --set ratio=2", "share_dropped must be in [0, 1], got 2.0"),
    ],
)
def test_bad_methods_are_refused_in_one_line(tmp_path, monkeypatch, spec, says):
    for name, text in BROKEN.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for command in (["cost"], ["eval", *SMALL, "--out", "out"]):
        line = refused(vlmflow(*command, "--pruner", *spec.split()))
        assert says in line
        assert "second" not in line
    assert not (tmp_path / "out").exists()
    for command in (["sweep", *SMALL, "--out", "out"], ["bench"]) if " " not in spec else ():
        assert says in refused(vlmflow(*command, "--pruners", f"himap,{spec}"))


def test_two_methods_of_one_name_are_not_mixed_up(norm, tmp_path):
    (tmp_path / "again.py").write_text(NORM)
    assert len(find_pruners([f"{norm}:Norm", "himap", f"{norm}:Norm", HiMAP])) == 2
    with pytest.raises(ValueError, match="two methods are called norm; give one of the classes another name"):
        find_pruners([f"{norm}:Norm", f"{tmp_path / 'again.py'}:Norm"])


def test_a_name_of_vlmflows_own_is_refused_where_the_class_is_written():
    with pytest.raises(ValueError, match="VTW: 'vtw' is one of vlmflow's own methods; give it another name"):
        type("VTW", (Pruner,), {"__module__": "elsewhere"})
    assert type("Mine", (HiMAP,), {"__module__": "elsewhere"}).name == "mine"


@pytest.mark.parametrize(
    ("changes", "share", "says"),
    [
        ({"ratio: float": "part: float", "self.ratio": "self.part"}, 0.5, "norm cannot be set to a budget: it has no"),
        ({"self.ratio)": "self.ratio / 2)"}, 0.3, "cannot give a mean of 30.0% .*: 55.0% is the least that it gives"),
        ({"self.ratio)": "0.5 + self.ratio / 2)"}, 0.9, "cannot give a mean of 90.0% .*: 60.0% is the nearest"),
    ],
)
def test_a_budget_that_a_method_cannot_meet(norm, changes, share, says):
    for old, new in changes.items():
        norm.write_text(norm.read_text().replace(old, new))
    with pytest.raises(ValueError, match=says):
        with_budget(find_pruner(f"{norm}:Norm"), share, 10)
