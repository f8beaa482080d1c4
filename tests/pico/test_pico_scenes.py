"""Pico's world: scenes are pure functions of seeds, and every question about them has a true answer."""

import random
import subprocess
import sys
from collections import Counter
from hashlib import sha256

import numpy as np
import pytest
from PIL import Image

from recipes.pico import glyphs
from recipes.pico.patches import PATCH, patch_labels
from vlmflow.pico import samples
from vlmflow.pico.questions import CHOICE_LETTERS, KINDS, KNOWLEDGE, PLACES, SceneQuestion
from vlmflow.pico.scenes import (
    COLOUR_NAMES,
    GLYPHS,
    HELD_PAIRS,
    NAMES,
    THEME_OF,
    Scene,
    make_scene,
)

SEEDS = range(40)
DRAWN = {  # SHA-256 of the pixels, as DejaVu Sans itself drew them
    ("train", 0, 192, (2, 12)): "2a8dfa402f4f677c",
    ("train", 1, 192, (2, 12)): "0e83a72ff70f6c4c",
    ("train", 2, 192, (2, 12)): "3473cb8550c9161c",
    ("train", 3, 192, (2, 12)): "35f2a22160536b6d",
    ("train", 4, 192, (2, 12)): "8a5be9d1d9cc8e01",
    ("held_out", 1000000, 192, (2, 12)): "119df058cc13ba4f",
    ("held_out", 1000001, 192, (2, 12)): "30e0944303633424",
    ("held_out", 1000002, 192, (2, 12)): "5fe037f7e82cc992",
    ("held_out", 1000003, 192, (2, 12)): "0df80ae934f90f0a",
    ("held_out", 1000004, 192, (2, 12)): "77d4e350cba81779",
    ("new_pairs", 1000000, 192, (2, 12)): "6c6b3c6b1db8865a",
    ("new_pairs", 1000001, 192, (2, 12)): "5479d6ff97b50c28",
    ("new_pairs", 1000002, 192, (2, 12)): "4a3f87bd8b184393",
    ("new_pairs", 1000003, 192, (2, 12)): "0beafcffece0a941",
    ("new_pairs", 1000004, 192, (2, 12)): "84506aafb0c46fec",
    ("train", 0, 56, (1, 3)): "d894d35969955c46",
    ("train", 1, 56, (1, 3)): "f200cfb866e94ffb",
    ("train", 2, 56, (1, 3)): "c3527ec25fd24b3d",
    ("train", 0, 96, (2, 5)): "25cb9913f8e00235",
    ("train", 1, 96, (2, 5)): "4691c7939ed1123c",
    ("train", 2, 96, (2, 5)): "39240c7c2fd835bf",
}


def scenes(split: str = "train") -> list[Scene]:
    return [make_scene(split, seed, 192, (2, 12)) for seed in SEEDS]


def test_a_scene_is_a_function_of_its_seed():
    first, again, other = (make_scene("train", seed, 96, (2, 5)) for seed in (3, 3, 4))
    assert np.array_equal(first.pixels, again.pixels)
    assert first.things == again.things
    assert not np.array_equal(first.pixels, other.pixels)


def test_scenes_are_drawn_as_when_pico_was_trained():
    assert {scene: sha256(make_scene(*scene).pixels.tobytes()).hexdigest()[:16] for scene in DRAWN} == DRAWN


def test_the_shipped_pictographs_are_those_of_the_recipe():
    """To the outline: how grey its edge is hangs on the version of FreeType."""
    with Image.open(GLYPHS) as shipped:
        greys = np.abs(np.asarray(shipped, int) - np.asarray(glyphs.sheet(), int))
    assert (greys > 64).mean() < 1e-3


def test_drawing_a_scene_needs_no_matplotlib():
    code = (
        "import sys; from vlmflow.tasks import TASKS; sample = TASKS['pico'].samples(limit=1)[0]; "
        "print(sample.images[0].open().size, *({'matplotlib'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "(192, 192)"


def test_splits_share_no_scene():
    pictures = [make_scene(split, 5, 96, (2, 5)).pixels.tobytes() for split in ("train", "held_out", "new_pairs")]
    assert len(set(pictures)) == 3


def test_training_never_shows_a_held_pair_and_new_pairs_shows_nothing_else():
    for split, held in (("train", False), ("held_out", False), ("new_pairs", True)):
        for scene in scenes(split):
            assert all(((t.name, t.colour) in HELD_PAIRS) == held for t in scene.things)
    assert len(HELD_PAIRS) * 12 == len(NAMES) * len(COLOUR_NAMES)


def test_objects_lie_inside_and_do_not_overlap():
    for scene in scenes():
        cover = np.zeros((scene.canvas, scene.canvas), int)
        for thing in scene.things:
            x, y, width, height = thing.box
            assert x >= 0
            assert y >= 0
            assert x + width <= scene.canvas
            assert y + height <= scene.canvas
            cover[y : y + height, x : x + width] += 1
        assert cover.max() == 1
        assert len({(t.name, t.colour) for t in scene.things}) == len(scene.things)


def test_scenes_show_two_to_twelve_objects():
    shown = Counter(len(scene.things) for scene in (make_scene("train", s, 192, (2, 12)) for s in range(200)))
    assert set(shown) == set(range(2, 13))


def test_every_object_can_be_seen():
    scene = make_scene("train", 1, 192, (8, 8))
    for thing in scene.things:
        x, y, width, height = thing.box
        area = scene.pixels[y : y + height, x : x + width].astype(int)
        assert area.std(axis=(0, 1)).max() > 15


def test_patch_labels_say_what_a_patch_shows():
    scene = make_scene("train", 2, 192, (2, 12))
    labels = patch_labels(scene)
    side = scene.canvas // PATCH
    for patch in range(side * side):
        x, y = patch % side * PATCH, patch // side * PATCH
        here = [
            t
            for t in scene.things
            if t.box[0] < x + PATCH and x < t.box[0] + t.box[2] and t.box[1] < y + PATCH and y < t.box[1] + t.box[3]
        ]
        assert (labels.name[patch] >= 0) == bool(here)
        assert not here or NAMES[labels.name[patch]] in {t.name for t in here}
        assert not here or COLOUR_NAMES[labels.colour[patch]] in {t.colour for t in here}
        quarters = {("bottom" if t.centre[1] >= 96 else "top", "right" if t.centre[0] >= 96 else "left") for t in here}
        assert not here or tuple(PLACES[labels.quarter[patch]].split()) in quarters
    assert labels.centre.sum() == len(scene.things)


def is_true(question: SceneQuestion, scene: Scene) -> bool:
    """Check an answer from the words of the question alone."""
    names, colours = [t.name for t in scene.things], [t.colour for t in scene.things]
    pairs = set(zip(names, colours, strict=True))
    words, answer = question.text.rstrip("?.").split(), question.answer
    asked, _, options = question.text.partition("? A. ")
    if options:
        parts = ("A. " + options).split(". ")[1:]
        listed = {x: part.removesuffix(f" {y}") for x, y, part in zip(CHOICE_LETTERS, "BCD.", parts, strict=True)}
        answer, words = listed[answer], asked.split()
    match question.kind:
        case "exist_random" | "exist_popular" | "exist_adversarial":
            return (words[-1] in names) == (answer == "yes")
        case "exist_pair":
            return ((words[-1], words[-2]) in pairs) == (answer == "yes")
        case "exist_colour":
            return (words[-1] in colours) == (answer == "yes")
        case "colour" | "choice_colour":
            return {c for n, c in pairs if n == words[-1]} == {answer}
        case "colour_none":
            return words[-1] not in names and answer == "none"
        case "identity":
            return [n for n, c in zip(names, colours, strict=True) if c == words[-1]] == [answer]
        case "identity_none":
            return words[-1] not in colours and answer == "none"
        case "position" | "choice_position":
            (thing,) = (t for t in scene.things if t.name == words[-1])
            row, column = answer.split()
            x, y = thing.centre
            return (row == "top") == (y < scene.canvas / 2) and (column == "left") == (x < scene.canvas / 2)
        case "count":
            return int(answer) == (len(names) if words[2] == "objects" else colours.count(words[2]))
        case "choice_identity":
            return [option for option in listed.values() if option in names] == [answer]
        case "choice_knowledge":
            fits = KNOWLEDGE[asked.removeprefix("Which object shown ")]
            return [o for o in listed.values() if o in names and o in fits] == [answer]
        case "caption":
            said = [part.split()[-2:] for part in answer.rstrip(".").replace(" and ", ", ").split(", ")]
            return len(said) == min(4, len(names)) and all((name, colour) in pairs for colour, name in said)
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_true_and_varied(kind: str):
    rng = random.Random(0)
    answers: Counter[str] = Counter()
    for seed in range(300):
        scene = make_scene("train", seed, 192, (2, 12))
        question = KINDS[kind](rng, scene)
        if question is None:
            continue
        assert question.kind == kind
        assert is_true(question, scene), (question, scene.things)
        answers[question.answer] += 1
    assert answers.total() > 100
    if kind.startswith("exist"):
        assert 0.35 < answers["yes"] / answers.total() < 0.65
    if kind.startswith("choice"):
        assert all(0.15 < answers[letter] / answers.total() < 0.35 for letter in CHOICE_LETTERS)


def test_adversarial_negatives_share_a_theme_with_what_is_there():
    rng = random.Random(0)
    for scene in scenes():
        question = KINDS["exist_adversarial"](rng, scene)
        if question and question.answer == "no":
            name = question.text.rstrip("?").split()[-1]
            assert THEME_OF[name] in {THEME_OF[t.name] for t in scene.things}


def test_captions_have_several_references():
    question = KINDS["caption"](random.Random(0), make_scene("train", 1, 192, (6, 6)))
    assert question
    assert len(question.answers) >= 2


def test_samples_are_held_out_scenes_with_true_questions():
    assert len(samples()) >= 24
    for number, sample in enumerate(samples()):
        scene = make_scene("held_out", 2_000_000 + number, 192, (2, 12))
        assert sample.image.exists()
        assert sample.objects == scene.things
        assert all(is_true(q, scene) for q in sample.questions)
