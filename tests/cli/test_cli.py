"""The command line as a user meets it: on the embedded model, with good and with bad input."""

import json
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig

from commands import ASK, ROOT, SCENE, refused, vlmflow
from vlmflow.pico import MODEL_DIR, samples
from vlmflow.pruners import PRUNERS
from vlmflow.tasks import TASKS, Source

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def test_run_saves_a_record_and_a_picture(tmp_path):
    run = vlmflow("run", "--image", SCENE.image, *ASK, "--compare", "--json", "--save", tmp_path / "out")
    assert run.returncode == 0, run.stderr
    record = json.loads(run.stdout)
    assert record["runs"].keys() == PRUNERS.keys()
    assert json.loads((tmp_path / "out/record.json").read_text()) == record
    himap = record["runs"]["himap"]
    assert himap["pruner"] == {"name": "himap", "k1": 1, "r1": 0.5, "k2": 3, "r2": 0.75}
    assert himap["image_tokens"] == [576] + [288] * 2 + [72] * 7
    assert len(himap["stages"]["3"]) == 72
    assert himap["cost"]["shares"]["exact_flops"] < record["runs"]["fastv"]["cost"]["shares"]["exact_flops"] < 1
    with Image.open(tmp_path / "out/patches.png") as picture:
        picture.load()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["patches.png", "record.json"]


def test_run_with_settings_and_several_images(tmp_path):
    two = ["--image", SCENE.image, "--image", samples()[1].image]
    settings = ["--set", "k=4", "--set", "ratio=0.9"]
    run = vlmflow("run", *two, *ASK, "--pruner", "fastv", *settings, "--save", tmp_path, "--json")
    assert run.returncode == 0, run.stderr
    (only,) = json.loads(run.stdout)["runs"].values()
    assert only["image_tokens"] == [1152] * 4 + [115] * 6
    assert (tmp_path / "patches.png").stat().st_size > 10_000


def test_bundled_pictures_go_by_number():
    named, filed = (vlmflow("run", "--image", image, *ASK, "--json") for image in ("sample:1", samples()[1].image))
    records = [json.loads(run.stdout) for run in (named, filed)]
    assert records[0].pop("images") == ["sample:1"]
    assert records[1].pop("images") == [str(samples()[1].image)]
    assert records[0] == records[1]


@pytest.mark.parametrize("name", ["sample:24", "sample:-1", "sample:rook", "sample:"])
def test_a_bundled_picture_that_is_not_there_is_refused(name):
    line = refused(vlmflow("run", "--image", name, *ASK))
    assert line == f"vlmflow: no {name}: there are 24 sample pictures, sample:0 to sample:23"


def test_samples_are_copied_for_evaluations_and_studies_to_read(tmp_path):
    folder = tmp_path / "new" / "samples"
    assert vlmflow("samples", folder).returncode == 0
    assert {path.name for path in folder.iterdir()} == {scene.image.name for scene in samples()} | {"questions.jsonl"}
    assert all((folder / scene.image.name).read_bytes() == scene.image.read_bytes() for scene in samples())
    asked = TASKS["jsonl"].samples(Source(folder / "questions.jsonl"), None)
    assert [(sample.question, sample.answer, sample.group) for sample in asked] == [
        (question.text, question.answer, question.kind)
        for scene in samples()
        for question in scene.questions
        if question.kind != "caption"
    ]
    questions = ["--limit", "20", "--pruner", "none", "--json", "--out"]
    run = vlmflow("eval", "--task", "jsonl", "--source", folder / "questions.jsonl", *questions, tmp_path / "eval")
    metric = json.loads(run.stdout)["metric"]
    assert metric["value"] > 0.7
    assert f"{metric['images']} images, too few to trust intervals" in run.stderr


def test_samples_overwrite_nothing(tmp_path):
    (tmp_path / "07.png").write_text("mine")
    line = refused(vlmflow("samples", tmp_path))
    assert line == f"vlmflow: {tmp_path / '07.png'} is there already; choose another folder"
    assert [path.name for path in tmp_path.iterdir()] == ["07.png"]
    assert (tmp_path / "07.png").read_text() == "mine"


def test_demo(tmp_path):
    run = vlmflow("demo", "--limit", "1", "--out", tmp_path / "demo")
    assert run.returncode == 0, run.stderr
    for name in PRUNERS:
        assert name in run.stdout
    assert json.loads((tmp_path / "demo/record.json").read_text())["asked"] == 2
    with Image.open(tmp_path / "demo/patches.png") as made, Image.open(ROOT / "docs/demo.png") as shown:
        assert made.size == shown.size
        drawn, printed = (np.asarray(picture.convert("RGB"), int) for picture in (made, shown))
    # of 576 patches a few may tie otherwise on another processor, and letters have other edges in another matplotlib
    differing = (abs(drawn - printed).max(2) > 4).mean()
    assert differing < 0.005, "the demo draws another picture: cp demo/patches.png docs/demo.png"


def test_settings_are_judged_by_the_models_own_depth():
    """The second layer before 2 fits pico's preset, whose first is before 1, though not a deeper model's."""
    run = vlmflow("run", "--image", SCENE.image, *ASK, "--set", "k2=2", "--json")
    (only,) = json.loads(run.stdout)["runs"].values()
    assert only["pruner"] == {"name": "himap", "k1": 1, "r1": 0.5, "k2": 2, "r2": 0.75}


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "cp1252:strict", "utf-8"])
def test_a_terminal_that_lacks_characters_is_shown_simpler_ones(encoding):
    """In columns that still stand below one another, and with an answer that is broken where it must be, not cut."""
    code = (
        "from vlmflow.cli import output as o; o.degrade(); table = o.plain_table('tokens', 'é')\n"
        "table.add_row('576→72', 'x' * 90); o.console.print(table); o.say('✓ ☃ [bold] :warning: ' + chr(0xD800))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "80"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    _, header, rule, row, rest, _, text = run.stdout.decode(encoding.split(":")[0]).splitlines()
    full, accented = encoding == "utf-8", not encoding.startswith("ascii")
    assert header.split() == ["tokens", "é" if accented else "?"]
    assert rule.strip() == ("─" if full else "-") * 78
    assert row.split()[0] == ("576→72" if full else "576>72")
    assert row.split()[1] + rest.strip() == "x" * 90
    assert text == ("✓ ☃ [bold] :warning: ?" if full else "+ ? [bold] :warning: ?")


def test_lists():
    assert all(name in vlmflow("pruners").stdout for name in PRUNERS)
    assert "qwen2_5_vl" in vlmflow("models").stdout


def test_cost_of_the_papers_setting():
    """HiMAP on LLaVA-1.5-7B: Table 1's 2.98 and 0.73 TFLOPs, and what they are when all is counted."""
    run = vlmflow("cost", "--model", "llava-1.5-7b", "--set", "k2=8", "--json")
    record = json.loads(run.stdout)
    assert record["schedule"] == [576] * 2 + [288] * 6 + [72] * 24
    assert record["cost"]["unpruned"]["paper_flops"] == 32 * (
        4 * 576 * 4096**2 + 2 * 576**2 * 4096 + 2 * 576 * 4096 * 11008
    )
    assert record["cost"]["pruned"]["paper_flops"] // 10**10 == 73
    assert 8 * 10**12 < record["cost"]["unpruned"]["exact_flops"] < 9 * 10**12
    assert "0-1: 576, 2-7: 288, 8-31: 72" in " ".join(run.stderr.split())


def test_cost_reads_the_embedded_models_config():
    record = json.loads(vlmflow("cost", "--model", "pico", "--pruner", "vtw", "--json").stdout)
    assert record["schedule"] == [576] * 5 + [0] * 5
    assert record["vision_flops"] > record["projector_flops"] > 0


def test_cost_of_the_papers_tables():
    run = vlmflow("cost", "--paper", "--json")
    rows = json.loads(run.stdout)
    assert len(rows) == 15
    assert {row["note"] for row in rows if row["printed_tflops"] == "3.06"} == {
        "TFLOPs 3.06: fits no K; ratio 53: K = 3"
    }
    assert "(6) TFLOPs 1.93: fits no K1, fits no K2" in run.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--model", "some/where"], "built in are llava-1.5-7b"),
        (["--model", "qwen2.5-vl-7b"], "--image-tokens"),
        (["--pruner", "himapp"], "unknown pruner"),
        (["--set", "k2=99"], "prunes before layer 99"),
    ],
)
def test_cost_refuses_in_one_line(args, says):
    assert says in refused(vlmflow("cost", *args))


def test_bench_of_a_model_and_of_a_geometry(tmp_path):
    sizes = ["--batch-size", "1,2", "--new-tokens", "2", "--repeats", "1", "--pruners", "himap,pyramiddrop", "--json"]
    run = vlmflow("bench", *sizes, "--save", tmp_path / "bench.json")
    assert run.returncode == 0, run.stderr
    assert "…" not in run.stderr  # nothing is cut where a terminal is 80 columns wide
    record = json.loads(run.stdout)
    assert json.loads((tmp_path / "bench.json").read_text()) == record
    assert [point["batch"] for point in record["points"]] == [1, 2]
    assert record["points"][1]["image_tokens"] == [576, 576]
    assert record["points"][0]["methods"].keys() == {"none", "himap", "pyramiddrop"}
    narrow = ["--geometry", "llava-1.5-7b", "--layers", "3", "--image-tokens", "4", "--text-tokens", "3"]
    run = vlmflow("bench", *narrow, "--new-tokens", "1", "--repeats", "1", "--pruners", "fastv", "--dtype", "float32")
    assert run.returncode == 0, run.stderr
    assert "share one set" in run.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--protocol", "fast"], "unknown protocol 'fast'; choose from deployed, paper"),
        (["--batch-size", "0"], "--batch-size wants whole numbers above 0"),
        (["--new-tokens", "4000000000"], "below a million"),
        (["--pruners", "himapp"], "unknown pruner 'himapp'"),
        (["--geometry", "gpt-9"], "wanted one of llava-1.5-7b"),
        (["--task", "pico", "--batch-size", "999999"], "samples, too few for --batch-size 999999"),
        (["--task", "nope"], "unknown task 'nope'"),
        (["--geometry", "llava-1.5-7b", "--dtype", "float99"], "dtype must be"),
        (["--geometry", "llava-1.5-7b", "--device", "toaster"], "device 'toaster'"),
        (["--geometry", "llava-1.5-7b", "--image-tokens", "576,999999"], "the prompt has 1000059 tokens, and random"),
        (["--layers", "5"], "--layers goes with --geometry"),
        (["--save", "."], "--save wants a file, and . is a folder"),
    ],
)
def test_bench_refuses_in_one_line(args, says):
    assert says in refused(vlmflow("bench", *args))


@pytest.mark.parametrize("option", ["--model", "--image-tokens", "--pruner"])
def test_an_option_that_is_given_twice_is_refused(option):
    run = vlmflow("cost", option, "5", option, "5")
    assert run.returncode == 2
    assert f"Invalid value for '{option}'" in run.stderr
    assert "given twice" in run.stderr
    assert run.stdout == ""


def test_a_field_that_is_set_twice_is_refused():
    assert "--set names one field twice" in refused(vlmflow("cost", "--set", "k1=1", "--set", "k1=2"))


WRITING = {
    "run": ["--image", SCENE.image, *ASK, "--save"],
    "demo": ["--out"],
    "samples": [],
    "bench": ["--save"],
    "eval": ["--task", "pico", "--out"],
    "sweep": ["--task", "pico", "--out"],
}


@pytest.mark.parametrize("command", WRITING)
def test_what_cannot_be_written_is_refused_before_the_work(command, tmp_path):
    (tmp_path / "file").touch()
    line = refused(vlmflow(command, *WRITING[command], tmp_path / "file/in/a/file"))
    assert line.endswith(f" wants a folder, and {tmp_path / 'file'} is a file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("command", WRITING)
def test_folders_that_may_not_be_written_are_refused_before_the_work(command, tmp_path):
    tmp_path.chmod(0o500)
    line = refused(vlmflow(command, *WRITING[command], tmp_path / "new/folder"))
    assert line.endswith(f": you may not write in {tmp_path}; choose another folder")


@pytest.mark.parametrize(
    ("args", "file", "shown"),
    [
        (["run", "--image", SCENE.image, *ASK, "--max-new-tokens", "1", "--save"], "record.json", "Image tokens by"),
        (["flow", "show", "--image", SCENE.image, *ASK, "--layers", "1", "--out"], "flow.json", ""),
        (["sweep", "--task", "pico", "--limit", "1", "--pruners", "vtw", "--out"], "sweep.json", "vtw"),
        (["flow", "knockout", "--task", "pico", "--limit", "5", "--layers", "1", "--out"], "windows.png", "## H1"),
    ],
    ids=lambda value: " ".join(map(str, value[:2])) if isinstance(value, list) else "",
)
def test_what_fails_in_the_end_has_told_its_results(args, file, shown, tmp_path):
    """A disk that is full or a file in the way is found when the record is written."""
    (tmp_path / file).mkdir()
    run = vlmflow(*args, tmp_path, "--json")
    assert run.returncode == 2
    assert f"{file}: cannot be written (Is a directory); mend that, or take another place\n" in run.stderr
    assert shown in run.stderr
    assert "versions" in run.stdout
    assert json.loads(run.stdout)
    assert not [*tmp_path.rglob("*.partial")]


@pytest.mark.parametrize(("args", "code"), [(["--version"], 0), (["run", "--image", "gone.png", "--prompt", "?"], 2)])
def test_as_a_process(args, code):
    run = subprocess.run([sys.executable, "-m", "vlmflow", *args], capture_output=True, text=True, check=False)
    assert run.returncode == code
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("command", [[], ["run"], ["demo"], ["samples"], ["cost"], ["bench"], ["pruners"], ["models"]])
def test_help(command):
    run = vlmflow(*command, "--help")
    assert run.returncode == 0
    assert "Usage" in run.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Images that are none, and model folders that are none."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("not an image")
    (folder / "cut.png").write_bytes(SCENE.image.read_bytes()[:900])

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    (folder / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")))
    bare, broken = folder / "bare", folder / "broken"
    bare.mkdir()
    broken.mkdir()
    for path in MODEL_DIR.iterdir():
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            content = content[: len(content) // 2]
        else:
            (bare / path.name).write_bytes(content)
        (broken / path.name).write_bytes(content)
    LlamaConfig().save_pretrained(folder / "llama")
    (folder / "nothing").mkdir()
    return folder


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--image", "gone.png"], "no image file at gone.png"),
        (["--image", "empty.png"], "the image file empty.png is empty"),
        (["--image", "text.png"], "text.png is no image"),
        (["--image", "cut.png"], "cut.png is broken"),
        (["--image", "huge.png"], "huge.png has more than"),
        (["--pruner", "himapp"], "unknown pruner 'himapp'; choose from"),
        (["--set", "k9=1"], "no field 'k9'; its fields are k1, r1, k2, r2"),
        (["--set", "r1=2"], "r1 must be a share in [0, 1), got 2.0"),
        (["--set", "k1"], "--set wants field=value"),
        (["--set", "k2=12"], "prunes before layer 12, but this model allows layers 1 to 9"),
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "what\udcff"], "--prompt holds half a character"),
        (["--model", "bare"], "no weights"),
        (["--model", "broken"], "cannot load 'broken': its weights are broken ("),
        (["--model", "llama"], "cannot load 'llama'"),
        (["--model", "nothing"], "cannot load 'nothing'"),
        (["--model", "some/where"], "hub cannot be reached"),
        (["--dtype", "float99"], "dtype must be auto or"),
        (["--device", "toaster"], "cannot use device 'toaster': "),
        pytest.param(["--device", "cuda"], "device 'cuda'", marks=without_cuda),
        (["--device", "hpu"], "device 'hpu'"),
        (["--device", "meta"], "device 'meta'"),
        (["--dtype", "int8"], "dtype must be auto or"),
        (["--save", "text.png"], "--save wants a folder"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_input_is_refused_in_one_line(files, monkeypatch, args, says):
    monkeypatch.chdir(files)
    default = {"--image": str(SCENE.image), "--prompt": SCENE.questions[0].text, "--save": "out"}
    default[args[0]] = args[1]
    run = vlmflow("run", *[part for pair in default.items() for part in pair])
    assert says in refused(run)
    assert not (files / "out").exists()


NO_WEIGHTS = {  # what is wrong with the order, and what is said; all can be known from the model's config alone
    "run": (["--image", SCENE.image, *ASK, "--set", "k2=12"], "prunes before layer 12"),
    "run a seed": (["--image", SCENE.image, *ASK, "--pruner", "random", "--set", f"seed={10**30}"], "seed must be"),
    "eval": (["--task", "pico", "--set", "k2=12"], "prunes before layer 12"),
    "eval a seed": (["--task", "pico", "--pruner", "random", "--set", "seed=-1"], "seed must be"),
    "sweep": (["--task", "pico", "--pruners", "himap", "--budgets", "0.01"], "himap cannot give a mean of 1.0%"),
    "flow saliency": (["--task", "pico", "--layers", "3,10"], "names layer 10, but this model has layers 0 to 9"),
    "flow knockout": (["--task", "pico", "--layers", "0-4000"], "names layer 10, but this model has layers 0 to 9"),
    "flow knockout widths": (["--task", "pico", "--windows", "3"], "windows must be 1, 2 or 5, got 3"),
    "flow show": (["--image", SCENE.image, *ASK, "--layers", "10"], "names layer 10"),
    "flow show far": (["--image", SCENE.image, *ASK, "--layers", "0-4000000000"], "names layers that no model has"),
    "flow show digits": (["--image", SCENE.image, *ASK, "--layers", "9" * 400], "names layers that no model has"),
}


@pytest.mark.parametrize("case", NO_WEIGHTS)
def test_what_a_config_tells_is_refused_before_weights_are_loaded(case, tmp_path, monkeypatch):
    def load(*_):
        pytest.fail("weights are loaded")

    monkeypatch.setattr("vlmflow.models.load", load)
    monkeypatch.setattr("vlmflow.evaluate.launch.load", load)
    args, says = NO_WEIGHTS[case]
    words = [word for word in case.split() if word in ("run", "eval", "sweep", "flow", "saliency", "knockout", "show")]
    run = vlmflow(*words, *args, *([] if "run" in words else ["--out", tmp_path / "out"]))
    assert says in refused(run)
    assert not (tmp_path / "out").exists()
