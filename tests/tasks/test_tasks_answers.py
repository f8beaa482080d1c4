"""Prompts as text, and answer rules on the answers that models really give."""

import pytest

from vlmflow.tasks import TASKS, Picture, Sample, TaskError
from vlmflow.tasks.answers import letter, normal

HINTED = Sample(
    "1", (), "Which is it?", choices=("a cat", "a dog", "dark red"), answer="B", context="Two pets.\nBoth old."
)
PLAIN = Sample("2", (), "Is there a dog in the image?", answer="yes", group="random")
OPEN = Sample("3", (), "What is {x}?", answer="-1<AND>-5", references=("Minus one.",), context="A board.", group="conv")

PROMPTS = {
    ("scienceqa", "paper"): (
        "Context: Two pets.\nBoth old.\nWhich is it? Options: (A) a cat (B) a dog (C) dark red. "
        "Answer with the option's letter from the given choices directly."
    ),
    ("scienceqa", "llava"): (
        "Context: Two pets.\nBoth old.\nWhich is it?\nA. a cat\nB. a dog\nC. dark red\n"
        "Answer with the option's letter from the given choices directly."
    ),
    ("aokvqa", "paper"): (
        "Analyse the image and choose the best answer for the following question: Which is it? "
        "Options: (A) a cat (B) a dog (C) dark red. Output the letter of the correct answer."
    ),
    ("aokvqa", "llava"): (
        "Which is it?\nA. a cat\nB. a dog\nC. dark red\n"
        "Answer with the option's letter from the given choices directly."
    ),
    ("aokvqa", "fastv"): (
        "\nAnalyse the image and choose the best answer for the following question:\nWhich is it?\n"
        "Options: (A) a cat (B) a dog (C) dark red\nJust output the letter of the correct answer."
    ),
    ("pope", "paper"): "question: Is there a dog in the image? Please just answer yes or no.",
    ("pope", "llava"): "Is there a dog in the image?\nAnswer the question using a single word or phrase.",
    ("nocaps", "paper"): "Provide a one-sentence caption for the provided image.",
    ("flickr30k", "paper"): "Provide a one-sentence caption for the provided image.",
    ("llava_bench", "paper"): "What is {x}?",
    ("mmvet", "paper"): "What is {x}?",
    ("mmvet", "lmms"): (
        "First please perform reasoning, and think step by step to provide best answer to the following question: \n\n"
        "What is {x}?"
    ),
    ("easy_vqa", "plain"): "Is there a dog in the image?",
    ("easy_vqa", "llava"): "Is there a dog in the image?\nAnswer the question using a single word or phrase.",
    ("pico", "plain"): "Is there a dog in the image?",
    ("pico_captions", "plain"): "Is there a dog in the image?",
    ("jsonl", "plain"): "Which is it? Options: (A) a cat (B) a dog (C) dark red. Answer with the option's letter.",
    ("jsonl", "llava"): (
        "Which is it?\nA. a cat\nB. a dog\nC. dark red\n"
        "Answer with the option's letter from the given choices directly."
    ),
}  # fmt: skip
SAMPLES = {"scienceqa": HINTED, "aokvqa": HINTED, "jsonl": HINTED, "llava_bench": OPEN, "mmvet": OPEN}


def test_every_prompt_is_frozen():
    assert set(PROMPTS) == {(name, style) for name, task in TASKS.items() for style in task.prompts}
    for (name, style), text in PROMPTS.items():
        assert TASKS[name].prompt(SAMPLES.get(name, PLAIN), style) == text, (name, style)


def test_paper_is_the_default_of_its_tasks_and_names_are_checked():
    assert {name for name, task in TASKS.items() if task.style() == "plain"} == {
        "easy_vqa", "pico", "pico_captions", "jsonl",
    }  # fmt: skip
    assert {task.style() for task in TASKS.values()} == {"paper", "plain"}
    assert TASKS["pope"].prompt(PLAIN).startswith("question: ")
    with pytest.raises(TaskError, match="aokvqa: prompt style must be one of paper, llava, fastv, got 'plain'"):
        TASKS["aokvqa"].prompt(HINTED, "plain")
    with pytest.raises(TaskError, match="pico: prompt style must be one of plain, got 'llava'"):
        TASKS["pico"].prompt(PLAIN, "llava")
    with pytest.raises(TaskError, match="pope: answer rule must be one of words, official, strict, declared, got 'x'"):
        TASKS["pope"].parse("yes", PLAIN, "x")


@pytest.mark.parametrize(
    ("name", "style", "same"),
    [
        ("scienceqa", "lmms", "llava"), ("pope", "lmms", "llava"), ("easy_vqa", "lmms", "llava"),
        ("jsonl", "lmms", "llava"), ("nocaps", "lmms", "paper"), ("flickr30k", "llava", "paper"),
        ("llava_bench", "lmms", "paper"), ("mmvet", "llava", "paper"), ("mmvet", "lmms", "lmms"),
        ("easy_vqa", "paper", "plain"), ("jsonl", "paper", "plain"), ("pico", "paper", "plain"),
        ("pico_captions", "paper", "plain"),
    ],
)  # fmt: skip
def test_a_style_without_a_text_of_its_own_means_the_one_it_shares(name, style, same):
    task = TASKS[name]
    assert task.style(style) == same
    assert task.prompt(SAMPLES.get(name, PLAIN), style) == PROMPTS[name, same]


def test_without_a_hint_or_choices():
    bare = Sample("1", (), "Which?", choices=("x", "y"))
    assert TASKS["scienceqa"].prompt(bare).startswith("Which? Options: (A) x (B) y. Answer")
    assert TASKS["jsonl"].prompt(PLAIN) == PLAIN.question
    assert TASKS["jsonl"].prompt(PLAIN, "llava").endswith("using a single word or phrase.")


def test_presets_and_lengths():
    captions = {"nocaps", "flickr30k", "llava_bench", "mmvet", "pico_captions"}
    assert {name for name, task in TASKS.items() if task.preset == "caption"} == captions
    assert {name: task.max_new_tokens for name, task in TASKS.items() if name in ("scienceqa", "nocaps", "mmvet")} == {
        "scienceqa": 16,
        "nocaps": 64,
        "mmvet": 1024,
    }


LETTERS = {  # answer: by the default rule, strict, lmms, llava
    "": (None, None, None, None),
    "  \n": (None, None, None, None),
    "B": ("B", "B", "B", "B"),
    " B\n": ("B", "B", "B", "B"),
    "b": ("B", None, "B", None),
    "(B)": ("B", None, None, None),
    "(b)": ("B", None, None, None),
    "[B]": ("B", None, None, None),
    "**B**": ("B", None, None, None),
    "B.": ("B", None, "B", None),
    "b. a dog": ("B", None, None, None),
    "B. a dog": ("B", None, "B", "B"),
    "B. A dog, not A cat": ("B", None, "B", "B"),
    "B: a dog": ("B", None, None, None),
    "B) a dog": ("B", None, None, None),
    "The answer is B.": ("B", None, None, "B"),
    "The answer is B": ("B", None, None, None),
    "the correct answer is (B), a dog": ("B", None, None, None),
    "Answer: B": ("B", None, None, None),
    "The correct option is B because of the tail.": ("B", None, None, None),
    "It is B": ("B", None, None, None),
    "A": ("A", "A", "A", "A"),
    "A dog": ("B", None, None, None),
    "A cat sits there": ("A", None, None, None),
    "a dog": ("B", None, None, None),
    "A DOG.": ("B", None, None, None),
    "I see a dog here": ("B", None, None, None),
    "a dog and a cat": (None, None, None, None),
    "A or B": (None, None, None, None),
    "A, B": (None, None, None, None),
    "A. a cat B. a dog": (None, None, "A", "A"),
    "The answer is A. The answer is B.": (None, None, None, None),
    "Not B": (None, None, None, None),
    "It is not (B)": (None, None, None, None),
    "D": (None, None, None, None),
    "(D)": (None, None, None, None),
    "The answer is D.": (None, None, None, None),
    "Dark red": ("C", None, None, None),
    "I don't know": (None, None, None, None),
    "Because": (None, None, None, None),
    "yes": (None, None, None, None),
}  # fmt: skip


@pytest.mark.parametrize("name", ["scienceqa", "aokvqa"])
@pytest.mark.parametrize("text", LETTERS)
def test_letters(name, text):
    task = TASKS[name]
    assert tuple(task.parse(text, HINTED, rule) for rule in ("letter", "strict", "lmms", "llava")) == LETTERS[text]
    assert task.parse(text, HINTED) == LETTERS[text][0]


CAR = Sample("4", (), "Which?", choices=("a red car", "a blue bus", "a dog", "a cat"))
DECLARED = {  # verbose answers, by the default rule
    "D\n\nExplanation: A is not right": "D",
    "**D**\n(A) is a car, (B) is a bus.": "D",
    "d\n\nA red car is not to be seen, so it isn't A.": "D",
    "The correct answer is B. Here's why: option A is wrong.": "B",
    "The correct answer is B.\n\nA) is wrong: the car is blue.\nC) is wrong too.": "B",
    "I considered (A), but it is incorrect. Final answer: D.": "D",
    "The answer is A. Wait, it has wheels. **Final answer:** (B)": "B",
    "The correct answer is d.": "D",
    "Answer: (c), as option D is too small": "C",
    "The right option is: **C**. Options A and B are vehicles.": "C",
    "It is not A. The answer is B.": "B",
    "The answer is B, A and C are wrong.": "B",
    "The answer is B because there is no car in both B and A.": "B",
    "The answer is a.": "A",
    "the answer is a dog": "C",
    "B\n\nOn second thoughts, the answer is C.": "C",
    "D because option A is wrong.": "D",
    "D, since A and B are not in it": "D",
    "(D) - the smallest, not A": "D",
    "B is correct, as A has no wheels.": "B",
    "B is the right option because A is wrong.": "B",
    # not declared, or twice
    "A - D are wrong": None,
    "D - or is it A?": "D",
    "B - big, C - small": None,
    "B is right of A": None,
    "B is correct. But C is correct too.": None,
    "D because it is not D": None,
    "D because it is a dog": None,  # which is C
    "As A is wrong, B or C": None,
    "The answer is A or B": None,
    "The answer is B, C.": None,
    "The answer is A, B, or C.": None,
    "The answer is (B)/(C)": None,
    "The answer is B. a blue bus, or C. a dog": None,
    "The answer is A. The answer is B.": None,
    "Final answer: A. Final answer: B.": None,
    "You might say the answer is A, but the correct answer is B.": None,
    "Is the answer A? Or is it (B)?": None,
    "Is the correct answer: A? No, not A, but (B).": None,
    "The answer is not A. Option B or C would do.": None,
    "B\n\nIt is not B.": None,
    "A\nB\nC": None,
    "The answer is E. Option A is wrong, option B too.": None,
    "the answer is a car, (B) or (C)": None,
    "option A is wrong and option B is right": None,
}  # fmt: skip


@pytest.mark.parametrize("text", DECLARED)
def test_a_declared_letter_is_read_and_no_other(text):
    assert letter(text, CAR) == DECLARED[text]


def test_a_choice_that_is_a_letter_is_not_taken_for_a_declared_one():
    genes = Sample("5", (), "Which?", choices=("c", "a", "b"))
    assert letter("The correct answer is c.", genes) == "A"
    assert letter("C\n\nExplanation: A is wrong", genes) is None


def test_a_choice_within_a_choice():
    sample = Sample("1", (), "?", choices=("red", "dark red", "blue", "blue"), answer="B")
    parse = TASKS["aokvqa"].parse
    assert parse("dark red", sample) == "B"
    assert parse("It looks dark red to me", sample) == "B"
    assert parse("red", sample) == "A"
    assert parse("blue", sample) is None  # two choices say so
    assert parse("redder", sample) is None


def test_a_choice_that_holds_a_letter():
    sample = Sample("1", (), "?", choices=("neither", "sample A", "sample B"), answer="C")
    parse = TASKS["scienceqa"].parse
    assert parse("sample B", sample) == "C"
    assert parse("It is sample B.", sample) == "C"
    assert parse("Sample A", sample) == "B"
    assert parse("C", sample) == "C"
    assert parse("The answer is C, sample B", sample) == "C"
    assert parse("C because neither moves", sample) is None


def test_fastv_rule_looks_for_the_right_letter_anywhere():
    parse = TASKS["aokvqa"].parse
    assert parse("AB", HINTED, "fastv") == "B"
    assert parse("A", HINTED, "fastv") is None


YES_NO = {  # answer: by the default rule, official, strict
    "Yes": ("yes", "yes", "yes"),
    "yes.": ("yes", "yes", None),
    "No": ("no", "no", "no"),
    "NO": ("no", "yes", "no"),
    " no \n": ("no", "no", "no"),
    "No, there is no dog.": ("no", "no", None),
    "Yes, there is a dog. No cat though.": (None, "yes", None),
    "Yes, there is no dog in the image.": (None, "no", None),
    "There is not a dog": (None, "no", None),
    "There isn't": (None, "yes", None),
    "": (None, "yes", None),
    "maybe": (None, "yes", None),
    "Nothing known": (None, "yes", None),
    "yes yes yes": ("yes", "yes", None),
    "Yes\nNo": (None, "yes", None),
}


DECLARED_YES_NO = {
    "Yes, there is no doubt.": "yes",
    "No. A yes would be wrong.": "no",
    "Yes. No.": None,
    "**No**\n\nA yes would need a dog.": "no",
    "The answer is yes. There is no other.": "yes",
    "There is no cat, so the answer is: No": "no",
    "There is no dog": "no",
    "no": "no",
    "Yes or no? Hard to say.": None,
    "Yes, no": None,
    "The answer is yes. The answer is no.": None,
    "The answer is yes or no": None,
    "No dog is seen. Yes, none.": None,
    "I would say yes, not no": None,
    "": None,
}


@pytest.mark.parametrize("text", DECLARED_YES_NO)
def test_a_declared_yes_or_no_is_read_and_no_other(text):
    assert TASKS["pope"].parse(text, PLAIN, "declared") == DECLARED_YES_NO[text]


@pytest.mark.parametrize("text", YES_NO)
def test_yes_or_no(text):
    task = TASKS["pope"]
    assert tuple(task.parse(text, PLAIN, rule) for rule in ("words", "official", "strict")) == YES_NO[text]
    assert task.parse(text, PLAIN) == YES_NO[text][0]


def test_unparsed_answers_are_wrong_and_counted():
    for name, sample in (("pope", PLAIN), ("scienceqa", HINTED), ("aokvqa", HINTED)):
        task = TASKS[name]
        outcomes = [task.outcome(sample, text) for text in ("", sample.answer, "hm", "hm")]
        metric = task.metric(outcomes)
        assert metric["unparsed"] == 3
        assert metric["excluded"] == 0
        assert metric["value"] == 25


def test_free_text():
    for name in ("nocaps", "flickr30k", "mmvet", "llava_bench", "pico", "jsonl"):
        assert TASKS[name].parse(" A dog\n\nruns. ", PLAIN) == "A dog runs."
        assert TASKS[name].parse(" \n", PLAIN) is None
    easy = Sample("1", (), "?", choices=("red", "yes", "no"), answer="red")
    parse = TASKS["easy_vqa"].parse
    assert [parse(text, easy) for text in ("Red.", "it is red", "red or no", "", "reddish", "green")] == [
        "red", "red", None, None, None, None,
    ]  # fmt: skip


def test_own_questions():
    task = TASKS["jsonl"]
    sample = Sample(
        "1", (Picture("x", b""),), "?", answer="the Eiffel Tower", references=("the Eiffel Tower", "Eiffel")
    )
    scores = [task.outcome(sample, text).score for text in ("eiffel tower.", " Eiffel ", "Louvre", "")]
    assert scores == [1, 1, 0, 0]
    assert task.outcome(HINTED, "the answer is B").score == 1
    assert task.outcome(HINTED, "the answer is B", rule="strict").parsed is None


def test_normal():
    assert normal("  The  RED   car.\n") == "red car"
    assert normal("'An apple!'") == "apple"
    assert normal("") == ""
