"""The figure of the caption benchmarks: CIDEr-D with Penn Treebank tokenisation; pure Python, no Java."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from vlmflow.tasks.core import Metric, Outcome, mean_score

ORDERS = (1, 2, 3, 4)
SIGMA = 6.0
TOKENIZER = "ptb-regex"  # for records: whose tokens a score was computed on

_REPLACED = {
    "&amp;": "&", "&lt;": "<", "&gt;": ">", "½": " 1/2", "¼": " 1/4", "¾": " 3/4", "¢": " cents", "£": "#", "€": "$",
    "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "--", "\u2014": "--", "\u2026": "...",
    "\u200b": " ",
}  # fmt: skip
_RENAMED = {
    "(": ("-lrb-",), ")": ("-rrb-",), "[": ("-lsb-",), "]": ("-rsb-",), "{": ("-lcb-",), "}": ("-rcb-",),
    "cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na"),
    "gimme": ("gim", "me"), "lemme": ("lem", "me"), "'tis": ("'t", "is"), "'twas": ("'t", "was"),
}  # fmt: skip
_ABBREVIATIONS = (
    "adj adm adv apr asst aug ave bldg blvd bros capt cmdr co col corp cpl ct dec dr esq etc feb fig fri ft gen gov "
    "hon inc jan jr jul jun lt ltd maj mar messrs mme mon mr mrs ms mt nov oct pfc ph prof pvt rd rep rev rt sen sep "
    "sept sgt sr st supt tel thu thurs tue tues univ vs wed"
)
_OPENERS = (  # a capitalised one of these after "b." ends the sentence, so that the dot is not the letter's
    "A About After An As At But Earlier He Her Here However If In It Last Many More Now Once One Other Our She Since "
    "So Some Such That The Their Then There These They This We When While What Yet You"
)
_WORD = r"[^\W_]+(?:-[^\W_]+)*"
_TOKEN = re.compile(
    "|".join(
        (
            r"[^\W\d_]+(?=n't\b)|n't\b",  # do n't
            r"'(?:s|m|d|re|ve|ll)\b|'n'|'(?:tis|twas|cause|em)\b|(?<!\w)'\d\ds?\b",  # man 's, rock 'n' roll, '60s
            r"\bo'(?:clock|er)\b|\bma'am\b|\b[dlo]'[^\W\d_]{3,}|\bol'",  # o'clock, l'oreal
            r"(?<![\w.])[^\W\d_](?:\.[^\W\d_])+(?!\w)\.?",  # p.m., u.s.
            rf"\b(?:{_ABBREVIATIONS.replace(' ', '|')})\.|\bno\.(?=\s*\d)",  # mr., no. 5
            rf"(?<![\w.'-])[^\W\d_]\.(?!\w)(?!\s+(?-i:{_OPENERS.replace(' ', '|')})\b)",  # a.
            r"[+-]?(?<![^\W_])(?:\d+(?:[.,:/]\d+)+|\.\d+)(?!-?\w)|(?<![\w-])[+-]\d+\b",  # 3.5, 10:30, -5
            r"\d+(?:\.\d+)+(?=[^\W\d])|\d+(?::\d+)+",  # 1.5 m
            r"[^\W_]+(?:[.?!][^\W_]+)+",  # sand.the
            rf"{_WORD}(?:/{_WORD}){{1,2}}",  # black/white
            rf"{_WORD}(?:_{_WORD})*|[#@][^\W\d_]\w*",
            r"-+|\.+|[!?]+|_+|\S",
        )
    ),
    re.IGNORECASE,
)
_QUOTES_AND_STOPS = re.compile(r"['\"`.,:;-]+|[?!]")


def cider(outcomes: Sequence[Outcome]) -> Metric:
    """CIDEr-D, a hundredfold as papers print it, over these images alone; an empty caption scores 0.

    The groups' values are means of the same scores, not CIDEr of the group alone.
    """
    captions = [tokenize(outcome.parsed or "") for outcome in outcomes]
    references = [[tokenize(text) for text in outcome.sample.references] for outcome in outcomes]
    return mean_score("CIDEr", cider_d(captions, references), outcomes, tokenizer=TOKENIZER)


def tokenize(caption: str) -> list[str]:
    """Penn Treebank tokens of a caption: lower case, without quotes, stops, commas, colons and dashes.

    Any run of white space, line breaks included, is one blank.

    Source: Stanford PTBTokenizer 3.4.1 as the COCO caption evaluation calls it (``-preserveLines -lowerCase``) and
    filters it; "don't" is "do n't", hyphenated words stay whole, brackets stay as "-lrb-".
    Departs: its grammar has rules for what captions do not hold, left out here: smileys, XML tags, web and e-mail
    addresses, telephone numbers in brackets, names like "AT&T".
    """
    text = " ".join(caption.split())
    for mark, plain in _REPLACED.items():
        text = text.replace(mark, plain)
    tokens: list[str] = []
    for match in _TOKEN.findall(text):
        token = match.lower()
        if not _QUOTES_AND_STOPS.fullmatch(token):
            tokens += _RENAMED.get(token, (token,))
    return tokens


def cider_d(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """CIDEr-D of each image's caption against its references, all as tokens; each from 0 to 10.

    A corpus's score is the mean, published 100-fold. Document frequencies come from these images' references, so
    that a part of a data set scores otherwise than as part of the whole, and one image alone scores 0.

    Source: CIDEr (CVPR 2015), in the D variant that the COCO caption evaluation computes (n-grams to 4, sigma 6, no
    stemming).

    Raises:
        ValueError: another number of captions than of reference lists, or an image without references.
    """
    if len(candidates) != len(references):
        raise ValueError(f"cider_d: {len(candidates)} captions for {len(references)} images")
    seen: Counter[tuple[str, ...]] = Counter()
    for number, texts in enumerate(references):
        if not texts:
            raise ValueError(f"cider_d: image {number} has no references")
        seen.update({gram for text in texts for order in ORDERS for gram in _grams(text, order)})
    n_images = math.log(max(1, len(references)))

    def weigh(tokens: Sequence[str], order: int) -> dict[tuple[str, ...], float]:
        counts = _grams(tokens, order)
        return {gram: n * (n_images - math.log(max(1, seen[gram]))) for gram, n in counts.items()}

    def image_score(candidate: Sequence[str], texts: Sequence[Sequence[str]]) -> float:
        ours = [weigh(candidate, order) for order in ORDERS]
        total = 0.0
        for text in texts:
            gap = len(candidate) - len(text)
            near = math.exp(-(gap**2) / (2 * SIGMA**2))
            theirs = [weigh(text, order) for order in ORDERS]
            total += near * sum(map(_similarity, ours, theirs)) / len(ORDERS)
        return 10 * total / len(texts)

    return list(map(image_score, candidates, references))


def _grams(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))


def _similarity(ours: dict[tuple[str, ...], float], theirs: dict[tuple[str, ...], float]) -> float:
    """Cosine with our weights clipped to the reference's, so that repeating a word does not pay."""
    shared = sum(min(weight, theirs[gram]) * theirs[gram] for gram, weight in ours.items() if gram in theirs)
    length = math.hypot(*ours.values()) * math.hypot(*theirs.values())
    return shared / length if length else 0.0
