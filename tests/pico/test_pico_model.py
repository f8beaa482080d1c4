"""Pico's model: prompts are the processor's, blocks equal separate prompts, the folder is a plain one."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from recipes.pico.batches import IGNORE, collate, encode_question, opening_ids, scene_example
from recipes.pico.blockwise import use_blocks
from recipes.pico.learning import (
    HALF_WAY,
    TaughtWords,
    answer_labels,
    counting_loss,
    option_verdicts,
    read,
    right_by_kind,
    see,
    verdict_loss,
)
from recipes.pico.model import build_model, build_processor, checksum, resize_positions, save_folder
from recipes.pico.muon import Muon, orthogonalise
from recipes.pico.patches import PATCH
from recipes.pico.text import EASY_VQA_WORDS, build_tokenizer
from vlmflow.pico import MODEL_DIR
from vlmflow.pico.questions import KINDS, SceneQuestion
from vlmflow.pico.scenes import COLOUR_NAMES, NAMES

CANVAS = 96


@pytest.fixture(scope="module")
def examples():
    return [scene_example("train", seed, CANVAS, (2, 5), (8, 5, 1)) for seed in range(3)]


def chat(text: str, image) -> list[dict]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def test_the_tokenizer_is_a_function_of_the_questions():
    assert build_tokenizer().get_vocab() == build_tokenizer().get_vocab()


def test_every_word_of_the_world_is_one_token(examples):
    tokenizer = build_tokenizer()
    words = [*NAMES, *COLOUR_NAMES, *EASY_VQA_WORDS.split(), *map(str, range(13)), "A", "B", "C", "D", "yes"]
    assert all(len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1 for word in words)
    for example in examples:
        for question in (q for group in example.questions for q in group):
            text = f"{question.text} {question.answer}"
            tokens = tokenizer.encode(text, add_special_tokens=False)
            assert len(tokens) == len(text.split()) + sum(text.count(mark) for mark in ".,?:")


@pytest.mark.parametrize("text", ["Is there a cat?", "Ünïcode ☀ 雪", " lead, two  spaces\n\tand 1234!", "<0x41>"])
def test_any_text_survives_the_tokenizer(text):
    tokenizer = build_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_training_prompts_are_what_the_processor_makes(examples):
    processor = build_processor(CANVAS)
    tokenizer = processor.tokenizer
    opening = opening_ids(tokenizer).tolist()
    picture = [processor.image_token_id] * (CANVAS // PATCH) ** 2
    for example in examples:
        batch = collate(tokenizer, [example])
        for question in (q for group in example.questions for q in group):
            asked = processor.apply_chat_template(
                chat(question.text, example.scene.image()),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            tokens, labels, _ = encode_question(tokenizer, question)
            prompt = tokens[: sum(label == IGNORE for label in labels) + 1]
            assert asked["input_ids"][0].tolist() == opening + picture + prompt
            assert torch.equal(asked["pixel_values"], batch.pixels)


def test_the_chat_template_takes_turns_and_a_system_text():
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Where?"}, {"type": "image"}]},
        {"role": "assistant", "content": "top left"},
        {"role": "user", "content": "Sure?"},
    ]
    text = build_processor().apply_chat_template(turns, add_generation_prompt=True)
    expected = "<s>Be brief. USER: <image>\nWhere? ASSISTANT: top left</s> USER: Sure? ASSISTANT:"
    assert text == expected


def test_blocks_equal_separate_prompts_through_the_stock_model(examples):
    model, processor = build_model(CANVAS, seed=1).eval(), build_processor(CANVAS)
    batch = collate(processor.tokenizer, examples)
    opening = opening_ids(processor.tokenizer)
    expected, judged, counted = [], [], []
    with torch.no_grad():
        for number in range(len(examples)):
            for group in batch.groups:
                asked = (group.ids[number], group.labels[number], group.verdicts[number])
                for ids, labels, verdicts in zip(*asked, strict=True):
                    picture = torch.full(((CANVAS // PATCH) ** 2,), processor.image_token_id)
                    prompt = torch.cat([opening, picture, ids])[None]
                    pixels = batch.pixels[number : number + 1]
                    through = model(input_ids=prompt, pixel_values=pixels, output_hidden_states=True)
                    expected.append(through.logits[0, -len(ids) :][labels != IGNORE])
                    half_way = model.lm_head(model.model.language_model.norm(through.hidden_states[HALF_WAY][0]))
                    judged.append(half_way[-len(ids) :][verdicts != IGNORE])
            counted.append(half_way[len(opening) : len(opening) + len(picture)])
        use_blocks(model)
        reading = read(model, see(model, batch.pixels), batch, opening)
    torch.testing.assert_close(reading.answers, torch.cat(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(reading.options, torch.cat(judged), atol=1e-5, rtol=0)
    torch.testing.assert_close(reading.patches, torch.stack(counted), atol=1e-5, rtol=0)


def test_options_are_judged_word_by_word():
    tokenizer = build_tokenizer()
    question = SceneQuestion(
        "choice_position", "Where is the cat? A. top left B. top right", ("B",), ("top left", "top right")
    )
    ids, _, verdicts = encode_question(tokenizer, question)
    judged = [(tokenizer.decode(ids[place]).strip(), verdict) for place, verdict in enumerate(verdicts) if verdict >= 0]
    assert judged == [("top", 1), ("left", 0), ("top", 1), ("right", 1)]


def test_a_right_verdict_costs_nothing(examples):
    batch, words = collate(build_tokenizer(), examples), TaughtWords.of(build_tokenizer())
    verdicts = option_verdicts(batch)
    verdicts = verdicts[verdicts != IGNORE]
    assert 0 < verdicts.sum() < len(verdicts)
    yes, no = words.verdicts
    said = torch.where(verdicts == 1, yes, no)
    scores = 50 * torch.nn.functional.one_hot(said, len(build_tokenizer())).float()
    for sign, cost, share in ((1, 0, 1), (-1, 50, 0)):
        loss, report = verdict_loss(sign * scores, words.verdicts, batch)
        assert loss.item() == pytest.approx(cost, abs=1e-6)
        assert report["verdict"] == share


def test_patches_count_the_objects_so_far(examples):
    batch, numbers = collate(build_tokenizer(), examples), TaughtWords.of(build_tokenizer()).numbers
    assert [build_tokenizer().decode(number).strip() for number in numbers] == [str(n) for n in range(13)]
    centre = batch.patches.centre
    assert centre.sum(1).tolist() == [len(example.scene.things) for example in examples]
    so_far = torch.stack([centre[:, : patch + 1].sum(1) for patch in range(centre.shape[1])], 1)
    right = 50 * torch.nn.functional.one_hot(numbers[so_far], len(build_tokenizer())).float()
    loss, report = counting_loss(right, numbers, batch.patches)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert report["sum"] == 1
    loss, report = counting_loss(right.roll(1, dims=1), numbers, batch.patches)
    assert loss.item() > 1


def test_right_means_every_token_of_the_answer(examples):
    batch = collate(build_tokenizer(), examples)
    labels = answer_labels(batch)
    answers = labels[labels != IGNORE]
    perfect = torch.nn.functional.one_hot(answers, len(build_tokenizer())).float()
    tally = right_by_kind(perfect, batch)
    assert set(tally) <= set(KINDS)
    assert all(right == asked for right, asked in tally.values())
    perfect[0] = 0
    assert sum(asked - right for right, asked in right_by_kind(perfect, batch).values()) == 1


def test_growing_the_canvas_keeps_where_things_are():
    model = build_model(CANVAS, seed=0)
    grown = resize_positions(model.state_dict(), 192)
    (name,) = (n for n in grown if n.endswith("position_embedding.weight"))
    small, large = model.state_dict()[name], grown[name]
    assert len(large) == 24 * 24 + 1
    assert torch.equal(small[0], large[0])
    corner = torch.stack([large[1:].reshape(24, 24, -1)[i, j] for i in (0, 1) for j in (0, 1)]).mean(0)
    distances = (small[1:] - corner).norm(dim=-1)
    assert distances.argmin() == 0


def test_orthogonalise_brings_singular_values_near_one():
    matrices = torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_muon_steps_as_torch_does():
    start = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    mine = Muon([ours], lr=0.02, weight_decay=0.01)
    torchs = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.01)
    for step in range(3):
        gradient = torch.randn(12, 12, generator=torch.Generator().manual_seed(step + 1))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        torchs.step()
    torch.testing.assert_close(ours.data, theirs.data, atol=2e-3, rtol=0)  # torch's is computed in bfloat16


def test_a_saved_folder_is_half_precision_and_loads_as_float32(tmp_path):
    model = build_model(192, seed=0)
    save_folder(model, tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], weight.half().float(), atol=0, rtol=0)
    assert (tmp_path / "model.safetensors").stat().st_size < 11.5e6


def test_the_shipped_folder_is_small_recorded_and_deep_enough():
    assert sum(file.stat().st_size for file in MODEL_DIR.iterdir()) <= 12e6
    assert checksum() in (MODEL_DIR / "README.md").read_text()
    config = json.loads((MODEL_DIR / "config.json").read_text())
    assert config["model_type"] == "llava"
    assert config["text_config"]["num_hidden_layers"] >= 10


def test_the_shipped_folder_answers():
    processor = AutoProcessor.from_pretrained(MODEL_DIR)
    model = AutoModelForImageTextToText.from_pretrained(MODEL_DIR)
    scene = scene_example("held_out", 0, 192, (2, 12), (1, 1, 0)).scene
    inputs = processor.apply_chat_template(
        chat("Is there a cat?", scene.image()),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 576
    assert np.array_equal(inputs["pixel_values"][0].shape, (3, 192, 192))
    output = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    said = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said.strip() in ("yes", "no")
