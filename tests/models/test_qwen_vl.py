"""Qwen-VL against what its published code computed, on tiny random weights in the published layout.

``tests/data/qwen_vl`` holds the weights, two pictures, and what the code of 2023 made of them in float32: pixels (every
eighth), the tower's output (every other embedding), the last logits of prompts, and greedy answers.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

import qwen_vl
from tiny import DEVICE
from vlmflow.models import ModelError, Question, convert, load, load_geometry
from vlmflow.models.processors import load_processor
from vlmflow.models.qwen_vl import model as room
from vlmflow.models.qwen_vl import register

DATA = Path(__file__).parents[1] / "data" / "qwen_vl"
EXPECTED = load_file(DATA / "expected.safetensors", device=DEVICE)
LIMIT = 1e-4


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


def test_pixels_are_the_reference_s(pixels):
    torch.testing.assert_close(pixels[:, :, ::8, ::8], EXPECTED["pixels"], atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_tower_is_the_reference_s(model, pixels):
    torch.testing.assert_close(model.model.visual(pixels)[:, ::2], EXPECTED["visual"], atol=LIMIT, rtol=0)


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
        torch.testing.assert_close(row[-len(expected) :], expected, atol=LIMIT, rtol=0)


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
    assert distance(wrong, "one", pixels) > LIMIT


def test_the_resampler_restated_is_itself(model, pixels, monkeypatch):
    """So that what the mistakes above change is one thing each."""
    monkeypatch.setattr(room._Resampler, "forward", pooled(on_keys=True, on_values=False))
    monkeypatch.setattr(room._MLP, "forward", with_gelu(F.gelu))
    assert distance(model, "one", pixels) < LIMIT
