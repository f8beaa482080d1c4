"""One table says what we know of each family: it is what the README lists, and true of each family's tiny model."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import oracles
import tiny
from vlmflow import HiMAP, attach, prune
from vlmflow.core.families import FAMILIES, PRICED, UNLISTED, Family, family_of, geometry_of
from vlmflow.engine.target import Target
from vlmflow.pruners import PRUNERS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
families = pytest.mark.parametrize("family", PRICED.values(), ids=PRICED)


def test_every_type_that_works_has_a_row():
    works = json.loads((ROOT / "docs" / "families.json").read_text())["works"]
    assert {*FAMILIES} == {name for name in works if "@" not in name}


def test_readme_lists_the_table():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", README, re.MULTILINE)
    listed = [(name, what) for name, what in rows if name not in PRUNERS]
    assert listed == [(family.model_type, family.known_as) for family in PRICED.values()]
    assert len(rows) == len(listed) + len(PRUNERS)


def test_every_family_has_a_tiny_model():
    assert {*PRICED} == {*tiny.FAMILIES, *tiny.RECURRENT} - {"gemma3_window"}


@families
def test_the_row_is_found_by_a_config(family: Family):
    config = tiny.build(family.model_type).model.config
    assert family_of(config) is family
    assert config.get_text_config(decoder=True).model_type in family.texts


def test_other_families_are_unlisted():
    assert family_of(hf.MllamaConfig()) is UNLISTED


@families
def test_the_geometry_is_that_of_the_model(family: Family):
    model = tiny.build(family.model_type).model
    geometry = geometry_of(model.config)
    assert (geometry.layers, geometry.hidden) == (6, 64)
    assert (geometry.vocab, geometry.hidden) == model.get_output_embeddings().weight.shape
    assert bool(geometry.experts) == any("experts" in name for name, _ in model.named_modules())
    assert geometry.vision is not None
    block = re.compile(r"(vision|visual).*\.(layers?|(res)?blocks)\.\d+$")
    blocks = [module for name, module in model.named_modules() if block.search(name)]
    assert len(blocks) == geometry.vision.layers


@families
def test_image_tokens_are_known_by_the_ids_in_the_config(family: Family):
    small = tiny.build(family.model_type)
    target, fields = Target.find(small.model), small.model.config.to_dict().values()
    assert target.family is family
    assert target.image_token_ids == tuple(token for token in (tiny.IMAGE, tiny.VIDEO) if token in fields)


# -- image token ids of other models


class Bare(hf.PreTrainedModel):
    """A model of a config alone; a class of its own, since transformers notes on the class what it finds out of it."""


def with_config(name: str, **fields: Any) -> hf.PreTrainedModel:
    """A transformers model that has a config and nothing else, which is all that ids are read from."""
    if not hasattr(hf, name):
        pytest.skip(f"this transformers has no {name}")
    return Bare(getattr(hf, name)(**fields))


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ("Molmo2Config", {}),  # which stores image_patch_id
        ("Phi4MultimodalConfig", {"vision_config": {"image_token_id": 7}}),
        ("Qwen2_5OmniConfig", {}),  # whose thinker has the ids
    ],
)
def test_ids_are_found_under_other_names_and_in_inner_configs(config: str, fields: dict[str, Any]):
    with pytest.raises(TypeError, match="wanted one text decoder in it, found 0"):  # so the ids were found
        Target.find(with_config(config, **fields))


def test_an_unset_id_is_named():
    with pytest.raises(TypeError, match=r"leaves image_token_id unset.*set model\.config\.image_token_id to the id"):
        Target.find(with_config("Blip2Config"))
    with pytest.raises(TypeError, match="wanted one text decoder in it, found 0"):
        Target.find(with_config("Blip2Config", image_token_id=7))


def test_a_config_without_such_a_field_is_refused():
    with pytest.raises(TypeError, match=r"no image token id in its config \(image_token_id, video_token_id, "):
        Target.find(with_config("GitConfig"))


# -- text decoders that embed images themselves


@pytest.fixture(scope="module")
def chameleon() -> hf.PreTrainedModel:
    """A model whose text decoder is called with token ids: images are tokens of its vocabulary."""
    names = {f"IMGIMG{chr(65 + code)}Z": 106 + code for code in range(16)}
    config = hf.ChameleonConfig(
        **tiny.TEXT,
        num_hidden_layers=6,
        vq_config={"embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "base_channels": 32, "resolution": 16},
        vocabulary_map={"<image>": tiny.IMAGE, **names},
        image_token_id=tiny.IMAGE,
    )
    model = hf.ChameleonForConditionalGeneration._from_config(config, attn_implementation="eager")
    tiny.randomize(model)
    return model.to(tiny.DEVICE).eval()


def test_pruning_equals_masking_where_the_text_decoder_reads_ids(chameleon: hf.PreTrainedModel):
    ids = torch.tensor([[*range(3, 8), *[tiny.IMAGE] * 16, *range(20, 27)]], device=tiny.DEVICE)
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pruner = HiMAP(1, 0.5, 3, 0.5)
    with prune(chameleon, pruner) as trace, torch.no_grad():
        logits = chameleon(**sample).logits[0]
    assert [count for (count,) in trace.image_tokens] == [16, 8, 8, 4, 4, 4]
    kept, _ = oracles.kept_sets(pruner, chameleon, sample)
    masked, _ = oracles.masked_forward(chameleon, sample, oracles.drops(chameleon, sample, kept))
    torch.testing.assert_close(logits[-1], masked[-1], atol=1e-4, rtol=0)
    with attach(chameleon), torch.no_grad():
        assert (chameleon(**sample).logits[0, -1] - masked[-1]).abs().max() > 1e-2
