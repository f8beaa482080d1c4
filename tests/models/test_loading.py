"""Checkpoints that are not what they seem: code of their own, weights that are missing, misnamed, misshapen, broken."""

import ast
import importlib
import json
import shutil
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vlmflow import HiMAP
from vlmflow.cli import app
from vlmflow.core import hub
from vlmflow.models import ModelError, ModelWarning, Question, ask, load, load_geometry, open_image, read_attends
from vlmflow.pico import MODEL_DIR, samples

ROOT = Path(__file__).parents[2]
WEIGHTS = "model.safetensors"
SCENE = samples()[0]

# the settings file that points to a checkpoint's own code, the classes that it maps to it, and what else it changes
OWN_CODE = {
    "config": ("config.json", {"AutoConfig": "own.Config"}, {"model_type": "unheard_of"}),
    "model": (
        "config.json",
        {"AutoConfig": "own.Config", "AutoModelForImageTextToText": "own.Model", "AutoProcessor": "own.Processor"},
        {"model_type": "unheard_of"},
    ),
    "a known type's model": ("config.json", {"AutoConfig": "own.Config", "AutoModelForImageTextToText": "own.M"}, {}),
    "processor": ("processor_config.json", {"AutoProcessor": "own.Processor"}, {"processor_class": "UnheardOf"}),
    "tokenizer": ("tokenizer_config.json", {"AutoTokenizer": ["own.Slow", None]}, {"tokenizer_class": "UnheardOf"}),
}


def copy_of_pico(folder: Path, change=lambda weights: weights) -> Path:
    """The embedded model in a folder of its own, with other weights."""
    shutil.copytree(MODEL_DIR, folder)
    save_file(change(load_file(MODEL_DIR / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})
    return folder


def with_code(folder: Path, kind: str) -> tuple[Path, Path]:
    """A checkpoint whose settings ask for code of its own, and the file that appears if any of that runs."""
    ran = folder.parent / f"{folder.name} ran"
    copy_of_pico(folder)
    name, classes, changes = OWN_CODE[kind]
    settings = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**settings, **changes, "auto_map": classes}))
    code = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n"
    (folder / "own.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code + "def generate(model, **kwargs): ...\n")
    return folder, ran


@pytest.mark.parametrize("kind", OWN_CODE)
def test_no_code_of_a_checkpoint_runs(tmp_path, kind, monkeypatch):
    """Whatever a user types: transformers would ask on stdin, where ``yes`` answers."""
    monkeypatch.setattr("builtins.input", lambda _: "y")
    folder, ran = with_code(tmp_path / "model", kind)
    runner = CliRunner()
    data = tmp_path / "questions.jsonl"
    data.write_text(json.dumps({"id": "1", "image": str(SCENE.image), "question": "what?", "answer": "yes"}))
    for args in (
        ["run", "--model", folder, "--image", SCENE.image, "--prompt", "what color is the rook?"],
        ["cost", "--model", folder, "--image-tokens", 5],
        ["eval", "--model", folder, "--task", "jsonl", "--source", data, "--out", tmp_path / "out"],
    ):
        done = runner.invoke(app, [str(arg) for arg in args], input="y\n" * 20)
        assert not ran.exists()
        if done.exit_code:  # refused, unless the library has code for it
            assert done.exit_code == 2, done.output
            assert "own.py" in done.stderr
            assert len(done.stderr.strip().split("\n")) == 1
        else:
            assert kind in ("a known type's model", "processor", "tokenizer")


def test_no_code_runs_in_a_worker(tmp_path):
    folder, ran = with_code(tmp_path / "model", "model")
    command = ["eval", "--model", folder, "--task", "pico", "--limit", 1, "--out", tmp_path / "out"]
    for launcher in (["-m", "vlmflow"], ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "vlmflow"]):
        engine = ["--engine", "ray", "--workers", "1"] if "torch.distributed.run" not in launcher else []
        arguments = [sys.executable, *launcher, *map(str, command), *engine]
        done = subprocess.run(arguments, input="y\n" * 100, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "own.py" in done.stderr
        assert not ran.exists()


def test_models_are_loaded_in_one_place():
    """Who loads must say that no foreign code may run, which two files can be read for."""
    found = set()
    for path in [*ROOT.glob("src/**/*.py"), *ROOT.glob("bench/*.py"), *ROOT.glob("recipes/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith(".from_pretrained"):
                continue
            if path.is_relative_to(ROOT / "recipes") and not ast.unparse(node.func).startswith("Auto"):
                continue  # a class of transformers' own, by name
            found.add(str(path.relative_to(ROOT / "src/vlmflow")))
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert said.get("trust_remote_code") == "False", f"{path}, line {node.lineno}"
    assert found == {"models/load.py", "models/processors.py"}


def some(weights: dict[str, torch.Tensor], change) -> dict[str, torch.Tensor]:
    """The weights with one of them changed."""
    return {
        key: change(value) if key.endswith("layers.3.mlp.up_proj.weight") else value for key, value in weights.items()
    }


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda w: {k: v for k, v in w.items() if "layers.3.mlp.up_proj" not in k},
            ("its checkpoint lacks 1 tensor (", "3.mlp.up_proj", "; get it complete"),
        ),
        (
            lambda w: {k: v for k, v in w.items() if "vision" not in k},
            ("checkpoint lacks ", " tensors (", "vision_tower", ", ...)"),
        ),
        (
            lambda w: {f"other.{k}": v for k, v in w.items()},
            ("checkpoint lacks ", " tensors (", ", ...), and holds ", "(other.", "that the model does not know"),
        ),
        (lambda w: some(w, lambda t: t[:-1].clone()), ("1 tensor (", "3.mlp.up_proj.weight is", "of a wrong shape")),
        (
            lambda w: some(w, lambda t: torch.full_like(t, torch.nan)),
            ("1 tensor (", "3.mlp.up_proj.weight", "not finite"),
        ),
        (
            lambda w: some(w, lambda t: t.index_fill(0, torch.tensor(1), torch.inf)),
            ("1 tensor (", "3.mlp.up_proj", "not finite"),
        ),
    ],
    ids=["one missing", "many missing", "all renamed", "shape", "nan", "inf"],
)
def test_weights_that_are_not_the_models_are_refused(tmp_path, change, says):
    folder = copy_of_pico(tmp_path / "model", change)
    ask = ["run", "--model", str(folder), "--image", str(SCENE.image), "--prompt", "what color is the rook?"]
    done = CliRunner().invoke(app, ask, catch_exceptions=False)
    assert done.exit_code == 2
    assert done.stdout == ""
    (line,) = done.stderr.strip().split("\n")
    assert all(text in line for text in says)


def test_unused_weights_are_said(tmp_path):
    folder = copy_of_pico(tmp_path / "model", lambda w: {**w, "extra.weight": torch.zeros(2)})
    with pytest.warns(ModelWarning, match=r"does not use 1 tensor \(extra\.weight\)"):
        load(str(folder), "cpu")


def test_a_whole_checkpoint_loads_without_a_word(recwarn):
    load("pico", "cpu")
    assert not [warning for warning in recwarn if issubclass(warning.category, ModelWarning)]


def test_a_broken_config_is_refused(tmp_path):
    folder = copy_of_pico(tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(ModelError, match="cannot read the config"):
        load_geometry(str(folder))
    with pytest.raises(ModelError, match="cannot load"):
        load(str(folder), "cpu")


def test_logits_that_are_not_finite_are_refused(tmp_path):
    """Weights may be finite where what comes of them is not."""
    folder = copy_of_pico(tmp_path / "model", lambda w: some(w, lambda t: torch.full_like(t, 60_000)))
    ask = ["run", "--model", str(folder), "--image", str(SCENE.image), "--prompt", "what color is the rook?"]
    done = CliRunner().invoke(app, [*ask, "--dtype", "float16"], catch_exceptions=False)
    assert done.exit_code == 2
    assert "logits are not finite" in done.stderr


def set_in_config(folder: Path, part: str, name: str, value: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[part][name] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("hidden_size", "wide", "its config is broken .*'hidden_size'.*expected int.*get the checkpoint again"),
        ("num_attention_heads", 0, r"its files are broken \(ZeroDivisionError: .*get the checkpoint again"),
        ("num_hidden_layers", 10**400, "its config names 10000000000000000000 decoder layers"),
        ("num_hidden_layers", -1, "its config names -1 decoder layers"),
    ],
    ids=["type", "zero", "digits", "negative"],
)
def test_a_config_of_nonsense_is_refused_in_one_line(tmp_path, name, value, says):
    """One line, and at once: transformers would build as many layers as the config says."""
    folder = copy_of_pico(tmp_path / "model")
    set_in_config(folder, "text_config", name, value)
    for read in (load, load_geometry):
        with pytest.raises(ModelError, match=says) as error:
            read(str(folder))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, '{"auto_map": [1], "model_type": "unheard_of"}'])
def test_a_config_that_is_none_is_refused_in_one_line(tmp_path, text):
    folder = copy_of_pico(tmp_path / "model")
    (folder / "config.json").write_text(text)
    for read in (load, load_geometry):
        with pytest.raises(ModelError) as error:
            read(str(folder))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("template", ["{% if %}", "{{ raise_exception('no images') }}", "{{ messages.no.such }}"])
def test_a_broken_chat_template_is_refused_before_the_weights(tmp_path, template):
    folder = copy_of_pico(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    (folder / WEIGHTS).write_bytes(b"")
    with pytest.raises(ModelError, match=r"its chat template is broken \(.*Error: .*get the checkpoint again"):
        load(str(folder), "cpu")


def test_a_folder_that_is_not_there_is_said():
    with pytest.raises(ModelError, match=r"cannot load './nope': there is no such folder"):
        load("./nope")
    with pytest.raises(ModelError, match=r"'pico' is no model of the hub, so it has no revision 'v2'"):
        load("pico", revision="v2")


def test_a_hub_that_does_not_answer_is_said_within_seconds(caplog, monkeypatch):
    """A listener that takes connections and says nothing; what it is asked is said before."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr("vlmflow.core.hub.ANSWER_WITHIN", 0.5)
        start = time.perf_counter()
        for read in (load, load_geometry, read_attends):
            with pytest.raises(ModelError, match=rf"127.0.0.1:{port} cannot be reached \(\w+\); check the name"):
                read("some/where")
        assert time.perf_counter() - start < 5
    assert caplog.messages == [f"vlmflow: asking http://127.0.0.1:{port} for some/where"] * 3


def test_a_hub_that_answers_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda api, name, **how: asked.append(name))
    hub.ask("model", "asked/once")
    hub.ask("model", "asked/once")
    hub.ask("model", "asked/once", "v2")
    assert asked == ["asked/once"] * 2


@pytest.mark.parametrize("inner", ["text_config", "vision_config"])
@pytest.mark.parametrize("value", [None, "llama", {}, {"model_type": "qwen2"}])
def test_an_inner_config_that_is_null_or_of_another_model_is_refused(tmp_path, inner, value):
    """transformers would take that of a model of 7 billion weights, and build it."""
    folder = tmp_path / "model"
    shutil.copytree(MODEL_DIR, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, inner: value}))
    readers = (load, load_geometry, read_attends) if (inner, value) == ("text_config", None) else (load,)
    for read in readers:
        with pytest.raises(ModelError, match=r"get the checkpoint again|get it complete") as refusal:
            read(str(folder))
        assert "\n" not in str(refusal.value)


def test_a_config_of_a_larger_model_is_refused_before_it_is_made(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MODEL_DIR, folder)
    set_in_config(folder, "text_config", "hidden_size", 4096)
    set_in_config(folder, "text_config", "num_attention_heads", 32)
    with pytest.raises(ModelError, match=r"its config makes 176,300,480 weights, too many for files of 10.9 MB"):
        load(str(folder), "cpu")


def test_prompts_behind_the_last_position_are_refused(tmp_path):
    folder = copy_of_pico(tmp_path / "model")
    set_in_config(folder, "text_config", "max_position_embeddings", 600)
    vlm = load(str(folder), "cpu")
    image = open_image(SCENE.image)
    vlm.encode([Question("What?", (image,))])
    with pytest.raises(ModelError, match=r"the prompt has 1\d\d\d tokens, and the model positions for 600; ask less"):
        vlm.encode([Question("What?", (image,)), Question("What?", (image, image))])
    rows = [{"id": str(n), "image": [str(SCENE.image)] * n, "question": "What?", "answer": "x"} for n in (1, 2)]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["--model", str(folder), "--device", "cpu"]
    eval_ = ["eval", "--task", "jsonl", "--source", data, "--max-new-tokens", "1", "--out", tmp_path / "eval"]
    study = ["flow", "saliency", "--samples", data, "--layers", "1", "--out", tmp_path / "study"]
    for args in (eval_, study):
        done = CliRunner().invoke(app, [*map(str, args), *asked])
        assert done.exit_code == 0, done.output
        assert "2 failed: ModelError: the prompt has 1" in done.stderr
    two = ["--image", str(SCENE.image)] * 2
    for args in (["run"], ["flow", "show", "--out", str(tmp_path / "show")]):
        done = CliRunner().invoke(app, [*args, *two, "--prompt", "What?", *asked])
        assert done.exit_code == 2
        assert done.stderr.startswith("vlmflow: the prompt has 1")


def test_a_processor_that_fails_is_named(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MODEL_DIR, folder)
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["image_processor"]["size"]["width"] = 10**29
    (folder / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"its processor fails \(OverflowError: .*\); get the checkpoint again"):
        load(str(folder), "cpu").encode([Question("What?", (open_image(SCENE.image),))])


def quantisation(package):
    """To 8 bits, by one of the packages that do it."""
    if package == "torchao":
        return transformers.TorchAoConfig(importlib.import_module("torchao.quantization").Int8WeightOnlyConfig())
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


@pytest.mark.filterwarnings("ignore")  # those packages' own
@pytest.mark.parametrize("package", ["torchao", "bitsandbytes"])
def test_quantised_checkpoints_load_and_are_pruned(package, tmp_path):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    plain = load("pico", "cpu")
    settings = {"quantization_config": quantisation(package), "device_map": "cpu"}
    transformers.AutoModelForImageTextToText.from_pretrained(MODEL_DIR, **settings).save_pretrained(tmp_path)
    plain.processor.save_pretrained(tmp_path)
    vlm = load(str(tmp_path), "cpu")
    assert type(vlm.model.model.language_model.layers[0].self_attn.q_proj.weight) is not torch.nn.Parameter
    question = Question("What color is the rook?", (open_image(SCENE.image),))
    (quantised,), (whole,) = (ask(each, [question], HiMAP(k1=1, k2=3), 4) for each in (vlm, plain))
    assert (quantised.answer.text, quantised.steps) == (whole.answer.text, whole.steps) == ("green", "576→288→72")
