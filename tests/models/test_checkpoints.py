"""Whole checkpoints of every family, as a download from the hub is: loaded, asked and evaluated by the command line."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from typer.testing import CliRunner

import checkpoints
import tiny
from vlmflow import HiMAP, prune
from vlmflow.cli import app
from vlmflow.core.families import PRICED
from vlmflow.core.grids import WHOLE, Tile
from vlmflow.engine.backends import set_aside_broken_torchvision
from vlmflow.models import Question, load, seen_by
from vlmflow.models.processors import ProcessorError, load_processor
from vlmflow.records.files import RecordError

VIDEOS = [name for name in PRICED if name.startswith(("llava_one", "internvl", "smolvlm", "qwen2", "qwen3", "glm"))]
FOR_VIDEOS = "fits this torch" if set_aside_broken_torchvision() else re.escape('pip install "vlmflow[video]"')
NO_TORCHVISION = find_spec("torchvision") is None
LACKING = {"5.0.0": ["smolvlm"], "5.12.1": ["idefics3", "smolvlm"]}.get(transformers.__version__, [])
LACKING = ["lfm2_vl", *LACKING] if NO_TORCHVISION else []
ABSENT = [name for name in PRICED if name not in transformers.CONFIG_MAPPING]
ASK = ["--prompt", "What color?", "--max-new-tokens", "2"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A family's folder, written when it is first asked for."""
    written = {}

    def folder(name):
        if name in ABSENT:
            pytest.skip("this transformers does not have this family")
        if name in LACKING:
            pytest.skip("this transformers needs torchvision for this family's images")
        if name not in written:
            written[name] = checkpoints.write(name, tmp_path_factory.mktemp(name) / name)
        return written[name]

    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Noise in several sizes: file by name."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    files = {name: folder / f"{name}.png" for name in checkpoints.SIZES}
    for name, (width, height) in checkpoints.SIZES.items():
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(files[name])
    return files


def vlmflow(*args):
    """Run a command in this process, with success, and return what it printed."""
    done = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "80"}, catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return done.stdout


def questions(pictures) -> list[Question]:
    """No image, one, two, none, one that is cut into tiles."""
    seen = {name: Image.open(file).convert("RGB") for name, file in pictures.items()}
    square, tall, wide = seen["square"], seen["tall"], seen["wide"]
    asked = [(), (square,), (square, tall), (), (wide,)]
    return [Question(f"What about number {10**number}?", images) for number, images in enumerate(asked)]


def own_ids(inputs, sample: int) -> list[int]:
    """A sample's token ids, without padding."""
    return inputs["input_ids"][sample][inputs["attention_mask"][sample].bool()].tolist()


def test_every_family_has_a_checkpoint():
    assert checkpoints.FAMILIES.keys() == PRICED.keys() == checkpoints.COUNTS.keys()


@pytest.mark.parametrize("name", PRICED)
def test_run(checkpoint, pictures, tmp_path, name):
    """One image, several, and one that is cut into tiles; a picture of the patches, unless pixels come as patches."""
    for shown, count in zip((["square"], ["square", "tall"], ["wide"]), checkpoints.COUNTS[name], strict=True):
        images = [part for one in shown for part in ("--image", pictures[one])]
        save = ["--save", tmp_path / "out"] if shown == ["wide"] else []
        printed = vlmflow("run", "--model", checkpoint(name), *images, *ASK, *save, "--json")
        (only,) = json.loads(printed)["runs"].values()
        assert only["image_tokens"][0] == count
        assert only["image_tokens"][-1] < count / 4
        assert only["answer"]["tokens"] == 2
    assert (tmp_path / "out" / "patches.png").exists() == (name != "lfm2_vl")


def cut(image: int, first: int, side: int, down: int, across: int) -> list[Tile]:
    """Equal tiles, row by row, and the whole image behind them."""
    boxes = [
        (column / across, row / down, (column + 1) / across, (row + 1) / down)
        for row in range(down)
        for column in range(across)
    ]
    return [Tile(image, box, side, side, first + number * side**2, side) for number, box in enumerate([*boxes, WHOLE])]


@pytest.mark.parametrize(
    ("name", "shown", "tiles"),
    [
        ("llava_next", ["wide"], [Tile(0, WHOLE, 2, 2, 0, 2), Tile(0, WHOLE, 2, 4, 4, 5)]),  # 5: an end to each row
        (
            "llava_next",
            ["square", "tall"],
            [
                *(Tile(0, WHOLE, 2, 2, 0, 2), Tile(0, WHOLE, 4, 4, 4, 5)),
                *(Tile(1, WHOLE, 2, 2, 24, 2), Tile(1, WHOLE, 4, 2, 28, 3)),
            ],
        ),
        ("llava_onevision", ["wide"], [Tile(0, WHOLE, 2, 2, 0, 2), Tile(0, WHOLE, 2, 4, 4, 5)]),
        ("llava_onevision", ["square", "tall"], [Tile(0, WHOLE, 2, 2, 0, 2), Tile(1, WHOLE, 2, 2, 5, 2)]),
        ("internvl", ["wide"], cut(0, 0, 4, 1, 4)),
        ("internvl", ["square", "tall"], [Tile(0, WHOLE, 4, 4, 0, 4), *cut(1, 16, 4, 2, 1)]),
        ("idefics3", ["square", "tall"], [*cut(0, 0, 4, 2, 2), *cut(1, 80, 4, 2, 1)]),
        ("smolvlm", ["wide", "square", "wide"], [*cut(0, 0, 4, 1, 2), *cut(1, 48, 4, 2, 2), *cut(2, 128, 4, 1, 2)]),
    ],
)
def test_where_the_tokens_of_tiles_lie(checkpoint, pictures, name, shown, tiles):
    vlm = load(str(checkpoint(name)), device="cpu")
    question = Question("?", tuple(Image.open(pictures[one]).convert("RGB") for one in shown))
    inputs = vlm.encode([question])
    seen = seen_by(vlm, question, inputs, (inputs["input_ids"][0] == tiny.IMAGE).nonzero().flatten().tolist())
    assert seen.grids is None
    assert seen.tiles == tiles


def test_tiles_that_are_found_nowhere_are_not_guessed(checkpoint, pictures):
    vlm = load(str(checkpoint("idefics3")), device="cpu")
    wide = Image.open(pictures["wide"]).convert("RGB")
    turned = wide.transpose(Image.Transpose.ROTATE_180)
    inputs = vlm.encode([Question("?", (wide,))])
    positions = (inputs["input_ids"][0] == tiny.IMAGE).nonzero().flatten().tolist()
    assert seen_by(vlm, Question("?", (turned,)), inputs, positions).tiles is None


def test_where_no_picture_can_be_drawn_the_numbers_are_written(checkpoint, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("vlmflow.models.tiles._parts", lambda *_: None)
    asked = ["--model", checkpoint("llava_next"), "--image", pictures["wide"], "--prompt", "What color?"]
    for command, out, file in (("run", "--save", "record.json"), ("flow show", "--out", "flow.json")):
        done = CliRunner().invoke(app, [*command.split(), *map(str, [*asked, out, tmp_path])], catch_exceptions=False)
        assert done.exit_code == 0, done.stderr
        assert done.stderr == "no picture: where this model's image tokens lie in their images cannot be told\n"
        assert json.loads((tmp_path / file).read_text())["seen"]["tiles"] is None
    assert {path.suffix for path in tmp_path.iterdir()} == {".json"}


@pytest.mark.parametrize("name", PRICED)
def test_run_on_text_alone(checkpoint, name):
    printed = vlmflow("run", "--model", checkpoint(name), *ASK, "--json")
    (only,) = json.loads(printed)["runs"].values()
    assert set(only["image_tokens"]) == {0}
    assert only["answer"]["tokens"] == 2
    assert only["cost"]["shares"]["exact_flops"] == 1


@pytest.mark.parametrize("name", PRICED)
def test_eval(checkpoint, pictures, tmp_path, name):
    asked = (["square"], ["square", "tall"], ["wide"])
    lines = [
        {"image": [str(pictures[one]) for one in shown], "question": "What color is it?", "answer": "red"}
        for shown in asked
    ]
    lines.insert(1, {"image": [], "question": "What is the color of the sky?", "answer": "blue"})
    file, out = tmp_path / "questions.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    how = ["--pruner", "fastv", "--set", "k=2", "--max-new-tokens", "2"]
    vlmflow("eval", "--task", "jsonl", "--source", file, "--model", checkpoint(name), *how, "--out", out)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["samples"] == {"asked": 4, "answered": 4, "failed": 0}
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    one, several, cut = checkpoints.COUNTS[name]
    assert [row["image_tokens"]["0"] for row in rows] == [one, 0, several, cut]


@pytest.mark.parametrize("name", PRICED)
def test_text_alone_in_a_batch_with_images(checkpoint, pictures, name):
    """Each sample of a mixed batch reads and answers as it does alone, pruned."""
    vlm, asked = load(str(checkpoint(name)), device=tiny.DEVICE), questions(pictures)
    together = vlm.encode(asked)
    with prune(vlm.model, HiMAP(k1=2, k2=4)), torch.no_grad():
        logits = vlm.model(**together).logits[:, -1]
        for sample, question in enumerate(asked):
            alone = vlm.encode([question])
            assert own_ids(alone, 0) == own_ids(together, sample)
            torch.testing.assert_close(vlm.model(**alone).logits[0, -1], logits[sample], atol=1e-3, rtol=0)
        assert len(vlm.generate(vlm.encode([asked[0], asked[3]]), 2)) == 2


@pytest.mark.parametrize("name", [name for name in PRICED if checkpoints.FAMILIES[name].frame[0]])
def test_a_prompt_starts_once(checkpoint, pictures, name):
    """Templates that write the start, tokenizers that add it, and PaliGemma, where images come first."""
    vlm = load(str(checkpoint(name)), device=tiny.DEVICE)
    batch = vlm.encode(questions(pictures))
    for sample in range(5):
        ids = [token for token in own_ids(batch, sample) if token != tiny.IMAGE]
        assert ids.index(1) == 0
        assert ids.count(1) == 1


def test_a_prompt_of_paligemma(checkpoint, pictures):
    """Images, start, text and newline, as it was trained; without images the same."""
    vlm = load(str(checkpoint("paligemma")), device=tiny.DEVICE)
    text, image = questions(pictures)[:2]
    batch = vlm.encode([text, image])
    read = [vlm.processor.tokenizer.decode(own_ids(batch, sample)) for sample in range(2)]
    assert read == ["<bos>What about number 1?\n", "<image>" * 16 + "<bos>What about number 10?\n"]


# -- processors


@pytest.mark.skipif(not NO_TORCHVISION, reason="torchvision is installed")
@pytest.mark.parametrize("name", VIDEOS)
def test_videos_are_refused_by_what_they_need(checkpoint, name):
    processor = load_processor(str(checkpoint(name)))
    assert type(processor).__name__ == checkpoints.FAMILIES[name].processor_class
    assert isinstance(processor, transformers.ProcessorMixin)
    with pytest.raises(ProcessorError, match=rf"^[^\n]* for videos: [^\n]*{FOR_VIDEOS}[^\n]*$"):
        processor(text=[processor.video_token], videos=[np.zeros((2, 32, 32, 3), dtype=np.uint8)])


@pytest.mark.skipif(NO_TORCHVISION, reason="torchvision is not installed")
@pytest.mark.parametrize("name", VIDEOS)
def test_videos_are_taken(checkpoint, name):
    processor = load_processor(str(checkpoint(name)))
    assert isinstance(processor.video_processor, transformers.BaseVideoProcessor)


@pytest.fixture
def broken_torchvision(tmp_path):
    """The environment of a process in which torchvision is found, and cannot be imported."""
    package = tmp_path / "broken" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")\n')
    source = os.path.dirname(os.path.dirname(sys.modules["vlmflow"].__file__))  # noqa: PTH120
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(package.parent), source])}


def test_a_broken_torchvision_is_told_of(checkpoint, pictures, broken_torchvision):
    command = ["run", "--model", checkpoint("qwen3_vl"), "--image", pictures["wide"], *ASK, "--device", "cpu", "--json"]
    run = subprocess.run(
        [sys.executable, "-m", "vlmflow", *map(str, command)], env=broken_torchvision, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    line, *_ = run.stderr.split("\n")
    assert line.endswith("fits this torch (RuntimeError: operator torchvision::nms does not exist)")
    (only,) = json.loads(run.stdout)["runs"].values()
    assert only["image_tokens"][0] == 36


def test_every_processor_loads_beside_a_broken_torchvision(checkpoint, broken_torchvision):
    """Also where transformers was imported before; what videos would need is said once."""
    names = [name for name in PRICED if name not in (*LACKING, *ABSENT)]
    code = (
        "import sys, transformers\n"
        "from vlmflow import prune\n"
        "from vlmflow.models.processors import load_processor\n"
        "for path in sys.argv[1:]: print(type(load_processor(path)).__name__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *(str(checkpoint(name)) for name in names)],
        env=broken_torchvision,
        capture_output=True,
        text=True,
    )
    assert run.stdout.split() == [checkpoints.FAMILIES[name].processor_class for name in names], run.stderr
    assert run.stderr.count("loaded for images only") == 1


def test_a_video_half_that_lacks_a_package_only(checkpoint, monkeypatch):
    """SmolVLM without num2words, whether torchvision is there or not."""
    folder = str(checkpoint("smolvlm"))
    load_processor(folder)
    module = sys.modules["transformers.models.smolvlm.processing_smolvlm"]
    monkeypatch.setattr(module, "num2words", None)
    processor = load_processor(folder)
    assert type(processor.video_processor).__name__ == "NoVideos"
    assert module.num2words is None


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A family's folder without its weights, to be damaged."""

    def made(name):
        folder = tmp_path / name
        folder.mkdir()
        for file in checkpoint(name).iterdir():
            if file.suffix != ".safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
        return folder

    return made


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("names", ["OwnProcessor", "LlavaProcessor", None])
def test_no_code_of_a_checkpoint_is_run(copy, monkeypatch, names):
    """Not even where a person would say yes; beside a processor of its own, a known one, or none named."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = copy("llava")
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    parts = ("AutoConfig", "AutoImageProcessor", "AutoModelForImageTextToText", "AutoProcessor")
    own = {"AutoTokenizer": ["own.Own", None], **dict.fromkeys(parts, "own.Own")}
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        edit(folder / file, auto_map=own, processor_class=names)
    edit(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer")
    edit(folder / "preprocessor_config.json", image_processor_type="OwnImageProcessor")
    edit(folder / "config.json", model_type="own", auto_map=own)
    with pytest.raises(ValueError, match=r"."):
        load_processor(str(folder))
    assert not (folder / "ran").exists()


def test_refusals(copy):
    """One line each, of what is missing and how to get it."""

    def refused(folder) -> str:
        with pytest.raises((ProcessorError, RecordError)) as caught:
            load_processor(str(folder))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    empty = copy("gemma3")
    (empty / "tokenizer.json").unlink()
    assert "tokenizer.json is missing; get the whole checkpoint" in refused(empty)
    slow = copy("llava")
    (slow / "tokenizer.json").rename(slow / "tokenizer.model")
    assert 'pip install "vlmflow[tokenizers]"' in refused(slow)
    torn = copy("qwen2_vl")
    (torn / "preprocessor_config.json").write_text('{"image')
    assert re.search(r"preprocessor_config\.json, line 1, column 2: broken JSON", refused(torn))
    own = copy("mistral3")
    edit(own / "processor_config.json", processor_class="OwnProcessor")
    assert re.match(r"its OwnProcessor is not in transformers [\d.]+; it needs code of its own", refused(own))
    blind = copy("internvl")
    for file in ("processor_config.json", "preprocessor_config.json"):
        (blind / file).unlink()
    edit(blind / "tokenizer_config.json", processor_class=None)
    edit(blind / "config.json", model_type="llama")
    assert "no processor for images" in refused(blind)


def test_a_folder_of_text_or_of_nothing(tmp_path):
    transformers.LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(ProcessorError, match="no image-text-to-text model"):
        load_processor(str(tmp_path / "llama"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises((OSError, ValueError)):
        load_processor(str(tmp_path / "nothing"))
