"""Questions about a scene, by kind: the kinds mirror the paper's tasks (POPE, A-OKVQA, VQA, captions).

Every kind is a function of a random generator and a scene that returns a question, or None where the scene has nothing
to ask of that kind. The "none" kinds ask for what is absent; they are what teaches the model to detect.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from vlmflow.pico.scenes import COLOUR_NAMES, NAMES, POPULAR, THEME_OF, THEMES, Scene, Thing

CHOICE_LETTERS = ("A", "B", "C", "D")
PLACES = ("top left", "top right", "bottom left", "bottom right")
MIDLINE_MARGIN = 0.1  # share of the canvas: nobody asks on which side of a line an object lies that sits on it
KNOWLEDGE = {
    "could cut paper": ("scissors", "sword"),
    "could fly": ("plane",),
    "could write": ("pencil",),
    "could ring": ("phone",),
    "could keep you dry": ("umbrella", "house"),
    "could hold a ship": ("anchor",),
    "could carry a message": ("envelope", "phone"),
    "could weigh fruit": ("scales",),
    "could catch a mouse": ("cat",),
    "is in the sky": ("sun", "cloud", "star", "moon", "bolt", "plane"),
    "is cold": ("snowman", "snowflake"),
    "is an animal": ("mouse", "cat"),
    "is a tool": ("hammer", "scissors", "pencil", "scales", "gear"),
    "is a plant": ("flower",),
    "is music": ("note",),
    "is a chess piece": THEMES["chess"],
    "is on cards": THEMES["cards"],
}


@dataclass(frozen=True)
class SceneQuestion:
    """One question about a picture; ``answers`` holds every accepted one, the one to learn first."""

    kind: str
    text: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()  # of a multiple choice, in the order of their letters

    @property
    def answer(self) -> str:
        """The answer to learn."""
        return self.answers[0]


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _ask(kind: str, text: str, answer: str) -> SceneQuestion:
    return SceneQuestion(kind, text, (answer,))


def _choice(rng: random.Random, kind: str, text: str, right: str, wrong: list[str]) -> SceneQuestion:
    """Four options in random order; the answer is the letter of the right one."""
    options = [right, *wrong]
    rng.shuffle(options)
    listed = " ".join(f"{letter}. {option}" for letter, option in zip(CHOICE_LETTERS, options, strict=True))
    return SceneQuestion(kind, f"{text} {listed}", (CHOICE_LETTERS[options.index(right)],), tuple(options))


def _absent(scene: Scene) -> list[str]:
    present = {thing.name for thing in scene.things}
    return [name for name in NAMES if name not in present]


def _absent_colours(scene: Scene) -> list[str]:
    present = {thing.colour for thing in scene.things}
    return [colour for colour in COLOUR_NAMES if colour not in present]


def _only_one(rng: random.Random, scene: Scene, by: Literal["name", "colour"]) -> Thing | None:
    """An object without a twin, so that "the cat", or the object of a colour, means one thing."""
    counts = Counter(getattr(thing, by) for thing in scene.things)
    single = [thing for thing in scene.things if counts[getattr(thing, by)] == 1]
    return rng.choice(single) if single else None


def _place(rng: random.Random, scene: Scene) -> tuple[Thing, str] | None:
    """An object without a twin and clear of the midlines, and the quarter that it lies in."""
    thing, middle = _only_one(rng, scene, "name"), scene.canvas / 2
    if thing is None or min(abs(c - middle) for c in thing.centre) < MIDLINE_MARGIN * scene.canvas:
        return None
    x, y = thing.centre
    return thing, f"{'top' if y < middle else 'bottom'} {'left' if x < middle else 'right'}"


def _exists(rng: random.Random, scene: Scene, kind: str, absent: list[str]) -> SceneQuestion | None:
    """Half the time about an object that is there, half about one of ``absent``."""
    if rng.random() < 0.5:
        return _ask(kind, f"Is there {_a(rng.choice(scene.things).name)}?", "yes")
    return _ask(kind, f"Is there {_a(rng.choice(absent))}?", "no") if absent else None


def exist_random(rng: random.Random, scene: Scene) -> SceneQuestion | None:
    """Existence against an absent object drawn evenly."""
    return _exists(rng, scene, "exist_random", _absent(scene))


def exist_popular(rng: random.Random, scene: Scene) -> SceneQuestion | None:
    """Existence against an absent object that scenes often show."""
    absent = [name for name in _absent(scene) if name in POPULAR]
    return _exists(rng, scene, "exist_popular", absent)


def exist_adversarial(rng: random.Random, scene: Scene) -> SceneQuestion | None:
    """Existence against an absent object of the same theme as a present one."""
    themes = {THEME_OF[thing.name] for thing in scene.things}
    absent = [name for name in _absent(scene) if THEME_OF[name] in themes]
    return _exists(rng, scene, "exist_adversarial", absent)


def exist_pair(rng: random.Random, scene: Scene) -> SceneQuestion | None:
    """Existence of a coloured object against a present object in a colour it does not have, or the reverse."""
    thing, pairs = rng.choice(scene.things), {(thing.name, thing.colour) for thing in scene.things}
    name, colour = thing.name, thing.colour
    if rng.random() < 0.5:
        return _ask("exist_pair", f"Is there {_a(f'{colour} {name}')}?", "yes")
    if rng.random() < 0.5:
        colour = rng.choice([colour for colour in COLOUR_NAMES if (name, colour) not in pairs])
    else:
        name = rng.choice([name for name in NAMES if (name, colour) not in pairs])
    return _ask("exist_pair", f"Is there {_a(f'{colour} {name}')}?", "no")


def exist_colour(rng: random.Random, scene: Scene) -> SceneQuestion | None:
    """Existence of a colour."""
    absent = _absent_colours(scene)
    if rng.random() < 0.5:
        return _ask("exist_colour", f"Is there anything {rng.choice(scene.things).colour}?", "yes")
    return _ask("exist_colour", f"Is there anything {rng.choice(absent)}?", "no") if absent else None


def colour(rng: random.Random, scene: Scene) -> SceneQuestion | None:
    """The colour of an object."""
    thing = _only_one(rng, scene, "name")
    return thing and _ask("colour", f"What color is the {thing.name}?", thing.colour)


def colour_none(rng: random.Random, scene: Scene) -> SceneQuestion | None:
    """The colour of an object that is not there."""
    return _ask("colour_none", f"What color is the {rng.choice(_absent(scene))}?", "none")


def identity(rng: random.Random, scene: Scene) -> SceneQuestion | None:
    """The object of a colour."""
    thing = _only_one(rng, scene, "colour")
    return thing and _ask("identity", f"Which object is {thing.colour}?", thing.name)


def identity_none(rng: random.Random, scene: Scene) -> SceneQuestion | None:
    """The object of a colour that is not there."""
    absent = _absent_colours(scene)
    return _ask("identity_none", f"Which object is {rng.choice(absent)}?", "none") if absent else None


def position(rng: random.Random, scene: Scene) -> SceneQuestion | None:
    """The quarter of the picture in which an object lies."""
    placed = _place(rng, scene)
    return placed and _ask("position", f"Where is the {placed[0].name}?", placed[1])


def count(rng: random.Random, scene: Scene) -> SceneQuestion | None:
    """How many objects there are, in all or of one colour."""
    colours = [thing.colour for thing in scene.things]
    if rng.random() < 0.4:
        return _ask("count", "How many objects are there?", str(len(colours)))
    colour = rng.choice(COLOUR_NAMES if rng.random() < 0.4 else colours)
    return _ask("count", f"How many {colour} objects are there?", str(colours.count(colour)))


def choice_colour(rng: random.Random, scene: Scene) -> SceneQuestion | None:
    """The colour of an object, of four."""
    thing = _only_one(rng, scene, "name")
    if thing is None:
        return None
    wrong = rng.sample([colour for colour in COLOUR_NAMES if colour != thing.colour], 3)
    return _choice(rng, "choice_colour", f"What color is the {thing.name}?", thing.colour, wrong)


def choice_identity(rng: random.Random, scene: Scene) -> SceneQuestion | None:
    """The only one of four objects that is there."""
    wrong = rng.sample(_absent(scene), 3)
    return _choice(rng, "choice_identity", "Which object is shown?", rng.choice(scene.things).name, wrong)


def choice_position(rng: random.Random, scene: Scene) -> SceneQuestion | None:
    """The quarter in which an object lies, of four."""
    placed = _place(rng, scene)
    if placed is None:
        return None
    thing, right = placed
    wrong = [place for place in PLACES if place != right]
    return _choice(rng, "choice_position", f"Where is the {thing.name}?", right, wrong)


def choice_knowledge(rng: random.Random, scene: Scene) -> SceneQuestion | None:
    """The only one of four objects that is there and fits: an absent object that fits is among the wrong ones."""
    present = [thing.name for thing in scene.things]
    apt = [(what, name) for what, names in KNOWLEDGE.items() for name in names if name in present]
    if not apt:
        return None
    what, right = rng.choice(apt)
    fits = KNOWLEDGE[what]
    wrong = [name for name in rng.sample(fits, len(fits)) if name not in present][:1]
    others = sorted({name for name in present if name not in fits})
    wrong += rng.sample(others, min(len(others), 2 - len(wrong)))
    wrong += rng.sample([name for name in _absent(scene) if name not in fits], 3 - len(wrong))
    return _choice(rng, "choice_knowledge", f"Which object shown {what}?", right, wrong)


def caption(_: random.Random, scene: Scene) -> SceneQuestion | None:
    """One sentence that names up to four objects, from the left; other orders and wordings are references too."""
    ways = (lambda t: t.centre[0], lambda t: t.centre[1], lambda t: -t.box[2] * t.box[3])
    sentences: list[str] = []
    for way in ways:
        said = [_a(f"{thing.colour} {thing.name}") for thing in sorted(scene.things, key=way)[:4]]
        listed = " and ".join(filter(None, (", ".join(said[:-1]), said[-1])))
        sentences += [f"There is {listed}.", f"The picture shows {listed}."]
    return SceneQuestion("caption", "Describe the picture.", tuple(dict.fromkeys(sentences)))


# Training draws a family evenly, then a kind of it.
SHORT = (
    (exist_random, exist_popular, exist_adversarial),
    (exist_pair,),
    (exist_colour,),
    (colour,),
    (colour_none,),
    (identity,),
    (identity_none,),
    (position,),
    (count,),
)
CHOICES = ((choice_colour,), (choice_identity,), (choice_position,), (choice_knowledge,))
CAPTIONS = ((caption,),)
KINDS: dict[str, Callable[[random.Random, Scene], SceneQuestion | None]] = {
    kind.__name__: kind for family in (*SHORT, *CHOICES, *CAPTIONS) for kind in family
}
