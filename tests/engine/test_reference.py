"""HiMAP against its authors' released forward: what that computed on random weights is in ``tests/data``.

``w.*`` are a Llama decoder's weights; ``in*`` four prompts of 7 system, 25 image and 11 text embeddings; ``pos*_k`` the
positions that entered layer k, ``h*`` the last hidden states of those that were left, ``full*`` those unpruned.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import tiny
from vlmflow import HiMAP, prune

IMAGE, SYSTEM, N_IMAGE, TEXT = 127, 7, 25, 11
HIMAP = HiMAP(k1=2, r1=0.5, k2=4, r2=0.6)  # 25 image tokens, 12, 5


@pytest.fixture(scope="module")
def reference():
    return load_file(Path(__file__).parents[1] / "data" / "himap_reference.safetensors")


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request, reference):
    """LLaVA around the reference's decoder."""
    text = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    vision = CLIPVisionConfig(**tiny.VISION, image_size=30, patch_size=6, projection_dim=32)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE, image_seq_length=N_IMAGE)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=request.param).eval()
    weights = {name.removeprefix("w."): weight for name, weight in reference.items() if name.startswith("w.")}
    unread = model.model.language_model.load_state_dict(weights, strict=False)
    assert unread.missing_keys == ["embed_tokens.weight"]
    assert unread.unexpected_keys == []
    return model


@torch.no_grad()
def last_states(model, embeds):
    """Of a prompt whose text has one id a token, and whose image has these features."""
    length = SYSTEM + N_IMAGE + TEXT
    model.get_input_embeddings().weight[:length] = embeds[0]
    ids = torch.arange(length)[None].clone()
    ids[:, SYSTEM : SYSTEM + N_IMAGE] = IMAGE
    features = SimpleNamespace(pooler_output=[embeds[0, SYSTEM : SYSTEM + N_IMAGE]])
    model.model.get_image_features = lambda **_: features
    return model.model(input_ids=ids, pixel_values=torch.zeros(1, 3, 30, 30)).last_hidden_state


@pytest.mark.parametrize("prompt", range(4))
def test_it_is_what_the_authors_code_computes(model, reference, prompt):
    """Bit by bit with eager attention, which is theirs."""
    embeds, limit = reference[f"in{prompt}"], 0 if model.config._attn_implementation == "eager" else 1e-4
    torch.testing.assert_close(last_states(model, embeds), reference[f"full{prompt}"], atol=limit, rtol=0)
    with prune(model, HIMAP) as trace:
        states = last_states(model, embeds)
    for layer in (1, 2, 4):
        text = [*range(SYSTEM), *range(SYSTEM + N_IMAGE, SYSTEM + N_IMAGE + TEXT)]
        entered = sorted([*text, *trace.kept[layer][0].tolist()])
        assert entered == reference[f"pos{prompt}_{layer}"].flatten().tolist()
    torch.testing.assert_close(states[:, entered], reference[f"h{prompt}"], atol=limit, rtol=0)
