"""What the project's files say twice agrees, and what the package imports is declared."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import yaml

import vlmflow

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
JOBS = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]


def distributions(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}


def imported(path: Path) -> set[str]:
    """The packages that a file imports at its top or inside."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - {"vlmflow"}


def test_what_the_package_imports_is_declared():
    extras = [name for extra, names in PROJECT["optional-dependencies"].items() if extra != "dev" for name in names]
    declared = distributions(PROJECT["dependencies"] + extras)
    installed = packages_distributions()
    for path in (ROOT / "src").rglob("*.py"):
        for name in imported(path):
            assert {*installed.get(name, [name.replace("_", "-")])} & declared, f"{path} imports {name}"


def test_every_python_that_is_promised_is_tested():
    promised = [name.rpartition(" :: ")[2] for name in PROJECT["classifiers"] if "Python :: 3." in name]
    assert JOBS["test"]["strategy"]["matrix"]["python"] == promised
    assert PROJECT["requires-python"] == f">={promised[0]}"


def test_every_transformers_that_is_promised_is_tested():
    compat = re.search(r"^COMPAT := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert [*JOBS["compat"]["strategy"]["matrix"]["transformers"], PINNED["transformers"]] == compat
    oldest = compat[0].removesuffix(".0")
    assert f"transformers>={oldest},<6" in PROJECT["dependencies"]


def test_pre_commit_runs_the_pinned_versions():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for repo in repos:
        tool = repo["repo"].rpartition("/")[2].removesuffix("-pre-commit")
        assert repo["rev"] == f"v{PINNED[tool]}"


def test_the_version_is_said_once_more_where_people_cite():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (vlmflow.__version__, PROJECT["license"])
    assert PROJECT["version"] == vlmflow.__version__


def test_the_page_quotes_the_engines_refusals():
    """docs/methods.md says what each error says; a message that is reworded is reworded there."""
    code = "".join(path.read_text() for path in sorted((ROOT / "src/vlmflow/engine").glob("*.py")))
    said = re.sub(r'"\s*\n\s*f?"', "", code)
    table = (ROOT / "docs/methods.md").read_text().split("## What cannot be pruned")[1]
    quotes = re.findall(r"^\| .+? \| (.+?) \| .+ \|$", table, re.MULTILINE)[1:]
    assert len(quotes) > 20
    assert [quote for quote in quotes if quote not in said] == []


def test_the_demo_installs_no_developers_tools(tmp_path):
    command = ["make", "--no-print-directory", "--dry-run", "demo", f"VENV={tmp_path}"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (installs,) = [line for line in said.splitlines() if "pip install" in line]
    assert installs.split()[2:] == ["--constraint", "constraints.txt", "--editable", "."]
    assert f"{tmp_path}/bin/vlmflow run --image" in said.splitlines()[-1]
