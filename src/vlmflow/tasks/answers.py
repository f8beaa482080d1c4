"""Answer rules: what a model's text answers, or None where it answers nothing or too much."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from vlmflow.tasks.sample import Sample

Rule = Callable[[str, Sample], str | None]

_ARTICLES = ("a ", "an ", "the ")
_NO_ARTICLE = r"(?!(?<=A) +(?!(?:or|and|is|because|as|since|[A-Z])\b)\w)"  # behind a letter: it is not the word "A"
_STATED = (  # "The final answer is (", "**Answer:** option "
    r"(?i:\b(final )?(?:answer|(?:correct|right|best) (?:option|choice))\b[\s*]*(?:is\b:?|:)[\s*]*"
    r"(?:(?:option|choice) +)?)[(\[*\"']*"
)


def normal(text: str) -> str:
    """A text without case, accents' spelling, outer punctuation, doubled blanks and a leading article."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(" .,:;!?\"'`()[]*")
    for article in _ARTICLES:
        text = text.removeprefix(article)
    return text


# -- one of several choices; every rule gives a letter


def letter(text: str, sample: Sample) -> str | None:
    """The one letter that the text names, else the one choice whose words it holds.

    A letter that is declared to be the answer ("The correct answer is B", "Final answer: d.", or alone on the first
    line) goes before letters marked as such ("B.", "(b)", "option B"), and these before bare capitals, among which "A"
    before a noun is an article. Several letters, a letter with "not" before it, or no letter and several choices give
    None: this rule does not guess.
    """
    known = sample.letters
    stripped = text.strip().strip("*`\"'").strip()
    if alone := _alone(stripped, known):
        return alone
    declared = _declared(stripped, sample)
    denied = set(re.findall(rf"\b(?i:not|isn't|nor)\s+(?:option\s+)?[(\[]?([{known}])\b{_NO_ARTICLE}", text))
    if denied and (not declared or denied & declared):
        return None
    marked = declared or {
        *re.findall(rf"[(\[]([{known}])[)\]]", text),
        *re.findall(rf"(?<![\w'])([{known}])[.:)](?!\w)", text),
        *re.findall(rf"\b(?i:answer|option|choice)\s*(?:(?i:is)\b|:)?\s*([{known}])\b{_NO_ARTICLE}", text),
        *(small.upper() for small in re.findall(rf"\A\s*[(\[]?([{known.lower()}])[)\].:](?!\w)", text)),
    }
    bare = set(re.findall(rf"(?<![\w'])([{known}])(?![\w']){_NO_ARTICLE}", text))
    spoken = _choice_in_words(text, sample)
    if spoken and marked | bare <= set(sample.choices[known.index(spoken)].split()):
        return spoken  # "sample B" may be choice C
    named = marked or bare
    if len(named) > 1 or (not marked and spoken and named != {spoken}):
        return None
    return named.pop() if named else spoken


def _alone(text: str, known: str) -> str | None:
    """The letter, in either case, that the text is."""
    match = re.fullmatch(rf"[(\[]?([{known}])[)\].:]*", text.strip().strip("*`\"'").strip(), re.IGNORECASE)
    return match and match[1].upper()


def _declared(text: str, sample: Sample) -> set[str]:
    """The letters that are said to be the answer: the final ones, else all of them, else the one that heads the text.

    It heads it alone on the first line, or with its reason ("D because A is wrong", "D - a house", "D is correct"),
    where no other one has a reason too and the text holds no other choice's words. Small letters count in brackets or
    at a sentence's end only, as "a" is a word. "B or C" and "B. a dog, C. a bus" declare two.
    """
    known = sample.letters
    if {choice.upper() for choice in sample.choices} & set(known):
        return set()  # it may be the choice that is said
    small = rf"[{known.lower()}](?=[)\]]|[*\"']*(?:[.!](?!\w)|[ \t]*(?:\n|\Z)))"
    comma = r"(?:(?:\bor\b|\band\b|[,/&])\s*)+"
    with_words, bare_list = rf"[.:)\]][^.:;!?\n]*{comma}", rf"[)\]*\"']*\s*{comma}(?:[{known}]\s*{comma})*"
    between = rf"(?:[.:)\]*\"']*[ \t]*|{with_words}|{bare_list})[(\[*\"']*"
    second = rf"{between}([{known}])\b(?:[.:)\]]|[ \t]*(?:[;!?\n]|\Z))"
    pattern = rf"{_STATED}([{known}]\b{_NO_ARTICLE}|{small})(?![)\]*\"']*\s*\?)(?:{second})?"
    stated = re.findall(pattern, text)
    if finals := [groups for groups in stated if groups[0]]:
        stated = finals
    if stated:
        return {named.upper() for _, *both in stated for named in both if named}
    heading, *others = text.splitlines() or [""]
    if head := _alone(heading, known):
        return {head} if not any(_alone(line, known) for line in others) else set()
    reason = rf",? +(?:because|since|as)\b| +[-—] +(?![{known}]\b)| +is +(?:the +)?(?:correct|right|best)\b(?! +of\b)"
    reasoned = re.findall(rf"(?<![\w'])[(\[*\"']*([{known}])[)\]*\"']*(?={reason})", text)
    first = re.match(rf"[(\[*\"']*([{known}])\b", text)
    alone = first is not None and set(reasoned) == {first[1]}
    return {*reasoned} if alone and _choice_in_words(text, sample) in (None, *reasoned) else set()


def _choice_in_words(text: str, sample: Sample) -> str | None:
    said = normal(text)
    wanted = [normal(choice) for choice in sample.choices]
    if wanted.count(said) == 1:
        return sample.letters[wanted.index(said)]
    held = [w for w in wanted if w and re.search(rf"(?<!\w){re.escape(w)}(?!\w)", said)]
    whole = [w for w in held if not any(w != other and w in other for other in held)]
    return sample.letters[wanted.index(whole[0])] if len(whole) == 1 else None


def letter_strict(text: str, sample: Sample) -> str | None:
    """The letter, if the text is nothing else.

    Source: HiMAP's released ScienceQA script.
    """
    stripped = text.strip()
    return stripped if len(stripped) == 1 and stripped in sample.letters else None


def letter_lmms(text: str, sample: Sample) -> str | None:
    """The letter alone in either case, or a capital and a full stop at the start.

    Source: lmms-eval's ScienceQA task.
    """
    stripped = text.strip()
    if len(stripped) == 1:
        return letter_strict(stripped.upper(), sample)
    return letter_strict(stripped[0], sample) if stripped[1:2] == "." else None


def letter_llava(text: str, sample: Sample) -> str | None:
    """The letter alone, or with ". " at the start, or after exactly one "The answer is".

    Source: LLaVA's ScienceQA evaluation.
    """
    if re.match(r"[A-E]\. ", text):
        return letter_strict(text[0], sample)
    stated = re.findall(r"The answer is ([A-Z]).", text)
    return letter_strict(stated[0] if len(stated) == 1 else text, sample)


LETTER_RULES: dict[str, Rule] = {
    "letter": letter,
    "strict": letter_strict,
    "lmms": letter_lmms,
    "llava": letter_llava,
}


# -- yes or no


def yes_no(text: str, sample: Sample) -> str | None:
    """Whichever of the words "yes" and "no" the text holds, if it holds one of the two."""
    words = set(re.findall(r"[a-z']+", text.casefold()))
    said = words & {"yes", "no"}
    return said.pop() if len(said) == 1 else None


def yes_no_official(text: str, sample: Sample) -> str:
    """No if the text before the first full stop has the word "No", "no" or "not", else yes, also for no text.

    Source: POPE's and LLaVA's evaluation. It answers for the model where the model does not.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def yes_no_strict(text: str, sample: Sample) -> str | None:
    """Yes or no in any case, if the text is nothing else.

    Source: lmms-eval's POPE task.
    """
    said = text.strip().casefold()
    return said if said in ("yes", "no") else None


def yes_no_declared(text: str, sample: Sample) -> str | None:
    """What is declared to be the answer, or heads the text as a word of its own, else as ``yes_no`` has it.

    "Yes, there is no doubt." is yes. Two that are declared, and "Yes or no" and the like, give None.
    """
    head = re.match(r"\W*(yes|no)\b(?=\W*\Z|\W*\n|[*\"')\]]*[.,:;!])(?!\W*(?:or|and|yes|no)\b)", text, re.IGNORECASE)
    declared = re.findall(rf"{_STATED}(?i:(yes|no))\b(?!\W*(?i:or|and|yes|no)\b)", text)
    said = {word.casefold() for _, word in declared}
    if head and not said:
        said = {head[1].casefold()}
    if said:
        return said.pop() if len(said) == 1 else None
    return yes_no(text, sample)


YES_NO_RULES: dict[str, Rule] = {
    "words": yes_no,
    "official": yes_no_official,
    "strict": yes_no_strict,
    "declared": yes_no_declared,
}


# -- free text


def words(text: str, sample: Sample) -> str | None:
    """The text on one line, or None if it is empty."""
    return " ".join(text.split()) or None


def one_of_choices(text: str, sample: Sample) -> str | None:
    """The one of the sample's choices that the text holds as a word."""
    held = set(re.findall(r"\w+", text.casefold())) & set(sample.choices)
    return held.pop() if len(held) == 1 else None
