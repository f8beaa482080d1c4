"""Qwen-VL against what its published code computed, on tiny random weights in the published layout.

``tests/data/qwen_vl`` holds the weights, two pictures, and what the code of 2023 made of them in float32: pixels (every
eighth), the tower's output (every other embedding), the last logits of prompts, and greedy answers.
"""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

import qwen_vl
from tiny import DEVICE
from vlmflow import HiMAP, prune
from vlmflow.cli import app
from vlmflow.models import ModelError, Question, convert, load, load_geometry
from vlmflow.models.processors import load_processor
from vlmflow.models.qwen_vl import model as room
from vlmflow.models.qwen_vl import register

DATA = Path(__file__).parents[1] / "data" / "qwen_vl"
EXPECTED = load_file(DATA / "expected.safetensors", device=DEVICE)
LIMIT = 2e-5  # unchanged they are 4e-6 apart, and 8e-5 behind padding, which shifts positions


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> nn.Module:
    """The reference's weights, read from shards as they were published, in float32."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "config.json").write_text((DATA / "config.json").read_text())
    qwen_vl.write_shards(load_file(DATA / "weights.safetensors"), folder)
    register()
    loaded, report = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded.to(DEVICE).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A whole checkpoint in the published layout, pictures and questions included."""
    return qwen_vl.write(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def pixels(folder) -> Tensor:
    """Both pictures at the published size."""
    processor = load_processor(str(folder)).image_processor
    side = {"height": 448, "width": 448}
    pictures = [Image.open(DATA / f"p{number}.png").convert("RGB") for number in (0, 1)]
    return processor(pictures, size=side, return_tensors="pt")["pixel_values"].to(DEVICE)


def prompt(name: str, pixels: Tensor) -> dict[str, Tensor]:
    """A prompt of the reference, with its pictures."""
    ids = EXPECTED[f"{name}.ids"][None].long()
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    seen = [0] if name == "long2048" else EXPECTED[f"{name}.pictures"].tolist()
    return {**sample, "pixel_values": pixels[seen]} if seen else sample


@torch.no_grad()
def distance(model: nn.Module, name: str, pixels: Tensor) -> float:
    """How far the last logits of a prompt are from the reference's."""
    expected = EXPECTED[f"{name}.last_logits"]
    return float((model(**prompt(name, pixels)).logits[0, -len(expected) :] - expected).abs().max())


@torch.no_grad()
def tower_distance(model: nn.Module, pixels: Tensor) -> float:
    return float((model.model.visual(pixels)[:, ::2] - EXPECTED["visual"]).abs().max())


def test_pixels_are_the_reference_s(pixels):
    torch.testing.assert_close(pixels[:, :, ::8, ::8], EXPECTED["pixels"], atol=1e-6, rtol=0)


def test_the_tower_is_the_reference_s(model, pixels):
    assert tower_distance(model, pixels) < LIMIT


@pytest.mark.parametrize("name", ["none", "one", "two", "long2048"])
def test_logits_are_the_reference_s(model, pixels, name):
    assert distance(model, name, pixels) < LIMIT


@pytest.mark.parametrize("name", ["none", "one", "two"])
def test_greedy_answers_are_the_reference_s(model, pixels, name):
    sample = prompt(name, pixels)
    out = model.generate(**sample, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert out[0, sample["input_ids"].shape[1] :].tolist() == EXPECTED[f"{name}.greedy"].tolist()


@torch.no_grad()
def test_a_padded_batch_is_the_reference_s(model, pixels):
    parts = [prompt(name, pixels) for name in ("one", "two")]
    width = parts[1]["input_ids"].shape[1]
    ids, mask = (
        torch.cat([F.pad(part[key], (width - part[key].shape[1], 0)) for part in parts])
        for key in ("input_ids", "attention_mask")
    )
    seen = torch.cat([part["pixel_values"] for part in parts])
    logits = model(input_ids=ids, attention_mask=mask, pixel_values=seen).logits
    for row, name in zip(logits, ("one", "two"), strict=True):
        expected = EXPECTED[f"{name}.last_logits"]
        torch.testing.assert_close(row[-len(expected) :], expected, atol=1e-4, rtol=0)


# -- what the reference would show, were it wrong


def swapped(one: str, other: str) -> Callable[[nn.Module], None]:
    """Two linear layers of every decoder layer in each other's place."""

    def change(model: nn.Module) -> None:
        for layer in model.model.language_model.layers:
            (holder, a), (_, b) = (path.split(".") for path in (one, other))
            part = getattr(layer, holder)
            first, second = getattr(part, a), getattr(part, b)
            setattr(part, a, second)
            setattr(part, b, first)

    return change


def with_eps(kind: str, field: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for module in model.modules():
            if type(module).__name__ == kind:
                setattr(module, field, 1e-5)

    return change


def with_transposed_projection(model: nn.Module) -> None:
    model.model.visual.proj.data = model.model.visual.proj.data.T.contiguous()


def with_rotary_base(model: nn.Module) -> None:
    frequencies = model.model.language_model.rotary_emb.inv_freq
    frequencies.copy_(frequencies ** (6 / 4))  # of 1e6 instead of 1e4


def in_thirds(self: nn.Module, x: Tensor) -> Tensor:
    q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.in_proj(x).chunk(3, -1))
    return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def bilinear(table: Tensor, length: int) -> Tensor:
    square = table.view(1, 16, 16, -1).permute(0, 3, 1, 2)
    square = F.interpolate(square, (32, 32), mode="bilinear", align_corners=False)
    return square.flatten(2).transpose(1, 2)[0]


def pooled(on_keys: bool, on_values: bool) -> Callable[..., Tensor]:
    """The resampler with positions elsewhere."""

    def forward(self: nn.Module, patches: Tensor) -> Tensor:
        values = self.ln_kv(self.kv_proj(patches))
        placed = values + room._resized(self.pos_embed, values.shape[1])
        queries = (self.ln_q(self.query) + self.pos_embed).expand(len(values), -1, -1)
        return self.attn(queries, placed if on_keys else values, placed if on_values else values)[0]

    return forward


def with_gelu(gelu: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda self, x: self.c_proj(gelu(self.c_fc(x)))


CHANGES = {  # of the model
    "w1 as gate": swapped("mlp.up_proj", "mlp.gate_proj"),
    "q and k swapped": swapped("self_attn.q_proj", "self_attn.k_proj"),
    "RMSNorm's eps": with_eps("Qwen2RMSNorm", "variance_epsilon"),
    "LayerNorm's eps": with_eps("LayerNorm", "eps"),
    "proj transposed": with_transposed_projection,
    "RoPE's base": with_rotary_base,
}
CODE = {  # what stands in for a function of the room
    "tanh GELU": ("_MLP.forward", with_gelu(lambda x: F.gelu(x, approximate="tanh"))),
    "quick GELU": ("_MLP.forward", with_gelu(lambda x: x * torch.sigmoid(1.702 * x))),
    "q, k and v in thirds": ("_Attention.forward", in_thirds),
    "bilinear positions": ("_resized", bilinear),
    "no positions on keys": ("_Resampler.forward", pooled(on_keys=False, on_values=False)),
    "positions on values": ("_Resampler.forward", pooled(on_keys=True, on_values=True)),
}


@pytest.mark.parametrize("mistake", [*CHANGES, *CODE])
def test_the_reference_sees_a_mistake(model, pixels, monkeypatch, mistake):
    wrong = copy.deepcopy(model)
    if mistake in CHANGES:
        CHANGES[mistake](wrong)
    else:
        path, instead = CODE[mistake]
        monkeypatch.setattr(f"{room.__name__}.{path}", instead)
    assert max(distance(wrong, "one", pixels), tower_distance(wrong, pixels)) > LIMIT


def test_the_resampler_restated_is_itself(model, pixels, monkeypatch):
    """So that what the mistakes above change is one thing each."""
    monkeypatch.setattr(room._Resampler, "forward", pooled(on_keys=True, on_values=False))
    monkeypatch.setattr(room._MLP, "forward", with_gelu(F.gelu))
    assert distance(model, "one", pixels) < LIMIT


# -- a checkpoint as it was published


def vlmflow(*args: object) -> str:
    """Run a command in this process, with success, and return what it printed."""
    done = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "100"}, catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return done.stdout


def test_every_command_reads_the_published_layout(folder, tmp_path):
    """``run`` and ``eval`` on it: ``test_checkpoints.py``."""
    asked = ["--image", DATA / "p1.png", "--prompt", "What color?"]
    vlmflow("flow", "show", "--model", folder, *asked, "--out", tmp_path / "flow")
    assert list((tmp_path / "flow").glob("*.png"))
    told = vlmflow("bench", "--model", folder, "--pruners", "himap", "--new-tokens", "2", "--repeats", "1")
    assert "himap" in told


def test_a_prompt_is_chatml_with_numbered_pictures(folder):
    vlm = load(str(folder), device=DEVICE)
    pictures = (Image.new("RGB", (9, 5)), Image.new("RGB", (3, 30), "red"))
    (ids,) = vlm.encode([Question("What color?", pictures)])["input_ids"].tolist()
    text = vlm.processor.tokenizer.decode(ids).replace("<imgpad>" * 256, "256")
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nPicture 1: <img>256</img>\n"
        "Picture 2: <img>256</img>\nWhat color?<|im_end|>\n<|im_start|>assistant\n"
    )
    spelled = [qwen_vl.RANKS.index(part) for part in (b"What", b" color", b"?")]
    assert any(ids[at : at + 3] == spelled for at in range(len(ids)))


def test_himap_keeps_128_and_32_of_256(folder):
    vlm = load(str(folder), device=DEVICE)
    inputs = vlm.encode([Question("What color?", (Image.new("RGB", (9, 5)),))])
    with prune(vlm.model, HiMAP(1, 0.5, 4, 0.75)) as trace:
        vlm.generate(inputs, 2)
    assert [count for (count,) in trace.image_tokens] == [256, 128, 128, 128, 32, 32]


@pytest.mark.parametrize("end", ["<|endoftext|>", "<|im_end|>", "<|im_start|>"])
def test_an_answer_ends_where_chat_ends_it(folder, end):
    """Two of the three ends are not in the published generation_config.json, and it asks for sampling."""
    vlm = load(str(folder), device=DEVICE)
    token = vlm.processor.tokenizer.convert_tokens_to_ids(end)
    vlm.model.lm_head.weight.data[token] = 0
    hidden = []
    hook = vlm.model.lm_head.register_forward_hook(
        lambda _, args, out: hidden.append(args[0]) or out.index_fill_(-1, torch.tensor([token], device=DEVICE), 1e4)
    )
    (answer,) = vlm.answer([Question("What color?")], 5)
    hook.remove()
    assert len(hidden) == 1
    assert (answer.text, answer.tokens) == ("", 0)


def test_a_prompt_above_the_trained_length_is_refused(folder, model):
    """There the published code becomes another model."""
    vlm = load(str(folder), device=DEVICE)
    with pytest.raises(ModelError, match=r"has 2[0-9]{3} tokens, and the model positions for 2048"):
        vlm.encode([Question("?" * 2048)])
    ids = torch.zeros(1, 2049, dtype=torch.long, device=DEVICE)
    with pytest.raises(ValueError, match="trained on 2048 tokens, and this prompt has 2049"):
        model(input_ids=ids)


def test_text_only_qwen_is_refused(folder, tmp_path):
    config = {key: value for key, value in qwen_vl.CONFIG.items() if key != "visual"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model.bin").touch()
    for read in (load, load_geometry):
        with pytest.raises(ModelError, match="it is Qwen of 2023 without images"):
            read(str(tmp_path))


def test_another_qwen_than_the_published_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**qwen_vl.CONFIG, "rotary_pct": 0.5}))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match="has another rotary_pct than any published Qwen-VL"):
        load(str(tmp_path))


def test_a_broken_vocabulary_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(qwen_vl.CONFIG))
    (tmp_path / "pytorch_model.bin").touch()
    for text, reason in {"YQ== x": "is broken", "YQ== 0\nYg== 1\nYw== 2\nYWJj 3": "no lower ranks make b'abc'"}.items():
        (tmp_path / "qwen.tiktoken").write_text(text)
        with pytest.raises(ModelError, match=reason):
            load(str(tmp_path))


# -- conversion


def test_a_converted_model_is_the_same(folder, tmp_path):
    out = tmp_path / "converted"
    assert "wrote 2 shards" in vlmflow("convert", folder, out)
    weights = {name for file in out.glob("*.safetensors") for name in load_file(file)}
    assert weights == {name for file in folder.glob("*.bin") for name in torch.load(file)}
    first, second = load(str(folder), device=DEVICE), load(str(out), device=DEVICE)
    asked = [Question("What color?", (Image.open(DATA / "p1.png").convert("RGB"),)), Question("Which words?")]
    inputs, again = first.encode(asked), second.encode(asked)
    assert inputs.keys() == again.keys()
    assert all(torch.equal(inputs[key], again[key]) for key in inputs)
    assert torch.equal(first.model(**inputs).logits, second.model(**inputs).logits)
    assert first.model.generation_config.eos_token_id == second.model.generation_config.eos_token_id
    assert len(first.model.generation_config.eos_token_id) == 3


def test_what_cannot_be_converted_is_refused(folder, tmp_path):
    with pytest.raises(ModelError, match="only Qwen-VL and Qwen-VL-Chat of 2023 need to be converted"):
        convert("pico", tmp_path / "out")
    done = shutil.copytree(folder, tmp_path / "done", ignore=shutil.ignore_patterns("*.bin"))
    (done / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"cannot convert '.*/done': .*/done holds no weights \(\*\.bin\) to convert"):
        convert(str(done), tmp_path / "out")
    done = CliRunner().invoke(app, ["convert", str(folder), str(folder)])
    assert (done.exit_code, "is not empty; choose another folder" in done.stderr) == (2, True)
