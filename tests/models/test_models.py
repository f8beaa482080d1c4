"""Asking models, and the tables of what works."""

import pytest
import torch
from PIL import Image
from transformers import pipeline

import tiny
from vlmflow import HiMAP, prune
from vlmflow.core.images import open_image
from vlmflow.models import VLM, Question, load, patch_grids, seen_images
from vlmflow.pico import MODEL_DIR, samples


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


@pytest.mark.parametrize(
    ("family", "images", "grids"),
    [
        ("llava", ["image", "image"], [(5, 5), (5, 5)]),
        ("gemma3", ["image"], [(4, 4)]),
        ("qwen2_5_vl", [(16, 48), (16, 16)], [(2, 6), (2, 2)]),
        ("mistral3", [(8, 32)], [(1, 4)]),
        ("mistral3", [(16, 32), (24, 8)], [(2, 4), (3, 1)]),
        ("internvl", ["image", "image"], [(4, 4), (4, 4)]),
        ("internvl", [(32, 64)], None),  # tiles
        ("internvl", [(32, 64), "image"], None),
        ("smolvlm", ["image"], [(4, 4)]),
        ("idefics3", [(32, 96)], None),  # four tiles of 4 x 4 tokens, which are no 8 x 8
        ("llava_next", [(32, 16)], None),  # the whole image, then its tiles
        ("llava_onevision", [(32, 16)], None),
        ("lfm2_vl", [(16, 48)], [(2, 6)]),
        ("lfm2_vl", [(16, 24), (16, 24)], [(2, 3), (2, 3)]),
        ("llava", [], None),
    ],
)  # fmt: skip
def test_patch_grids(family, images, grids):
    """Each image's own grid; none where it was cut into tiles, whose tokens follow one another."""
    small = tiny.build(family)
    sample = small.sample([part for image in images for part in (2, image)] + [3])
    n_image = int((sample["input_ids"] == tiny.IMAGE).sum())
    assert patch_grids(sample, small.model.config, n_image, len(images)) == grids


def test_images_are_seen_without_padding():
    """Images of several sizes are padded to the largest of them, on the right and below."""
    sample = tiny.build("mistral3").sample([2, (16, 32), 2, (24, 8), 3])
    sample["pixel_values"][0, :, 16:] = 99.0  # not seen, so that it must not set the scale either
    seen = seen_images(sample, [Image.new("RGB", (50, 50))] * 2)
    assert [image.size for image in seen] == [(32, 16), (8, 24)]
    assert seen[0].getextrema() == ((0, 255),) * 3


def test_weights_are_whole():
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) < 12 * 2**20
    assert next(load("pico").model.parameters()).dtype == torch.float32
