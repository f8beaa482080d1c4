"""Asking models, and the tables of what works."""

import re
from pathlib import Path

import pytest
import torch
from transformers import pipeline

import tiny
from vlmflow import PRUNERS, HiMAP, prune
from vlmflow.models import FAMILIES, VLM, Question, load, open_image
from vlmflow.pico import MODEL_DIR, samples

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.fixture(scope="module")
def pico() -> VLM:
    return load("pico")


@pytest.fixture(scope="module")
def asked():
    return [(open_image(sample.image), question) for sample in samples()[:2] for question in sample.questions[:2]]


def test_a_batch_answers_as_single_questions(pico, asked):
    questions = [Question(question.text, (image,)) for image, question in asked]
    with prune(pico.model, HiMAP.preset("qa", pico.n_layers)):
        together = pico.generate(pico.encode(questions), 8)
        alone = [pico.generate(pico.encode([question]), 8)[0] for question in questions]
    assert together == alone
    assert all(1 <= answer.tokens <= 8 and "</s>" not in answer.text for answer in together)


def test_pipeline(pico, asked):
    """transformers' own pipeline, inside the context."""
    image, question = asked[0]
    pipe = pipeline("image-text-to-text", model=pico.model, processor=pico.processor)
    content = [{"type": "image", "image": image}, {"type": "text", "text": question.text}]
    messages = [{"role": "user", "content": content}]
    with prune(pico.model, HiMAP.preset("qa", pico.n_layers)) as trace:
        (out,) = pipe(text=messages, max_new_tokens=8, return_full_text=False)
        (expected,) = pico.generate(pico.encode([Question(question.text, (image,))]), 8)
    assert out["generated_text"].strip() == expected.text
    assert trace.image_tokens[-1] == (72,)


def test_text_alone(pico):
    (answer,) = pico.generate(pico.encode([Question("is there a moon?")]), 4)
    assert answer.tokens <= 4


def test_the_tested_families_are_those_listed():
    assert set(FAMILIES) == set(tiny.FAMILIES) - {"gemma3_window"}
    for name in FAMILIES:
        assert tiny.build(name).model.config.model_type == name


def test_readme_lists_what_works():
    rows = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    assert set(rows) == {*FAMILIES, *PRUNERS}


def test_readme_code_runs(pico, asked):
    """The first Python block, with a model and inputs at hand."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[:1]
    image, question = asked[0]
    names = {"model": pico.model, "inputs": pico.encode([Question(question.text, (image,))])}
    exec(code, names)
    assert names["trace"].image_tokens[-1] == (72,)


def test_weights_are_whole():
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) < 12 * 2**20
    assert next(load("pico").model.parameters()).dtype == torch.float32
