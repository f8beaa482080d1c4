"""CIDEr-D against values of the COCO caption evaluation, and the tokeniser against Stanford's tokens."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from vlmflow.tasks.cider import cider_d, tokenize

CASES = json.loads((Path(__file__).parents[1] / "data" / "cider_cases.json").read_text())["cases"]

# What PTBTokenizer 3.4.1 gives after the evaluation's filter.
TOKENS = {
    "A man's dog don't can't cannot gonna wanna gotta.": "a man 's dog do n't ca n't can not gon na wan na got ta",
    "It costs $3.5, i.e. 100% of £5 and 5€.": "it costs $ 3.5 i.e. 100 % of # 5 and 5 $",
    "black/white and/or 1/2 cup 24/7": "black/white and/or 1/2 cup 24/7",
    "p.m. 5 p.m. U.S. army in the U.S.": "p.m. 5 p.m. u.s. army in the u.s.",
    "Mr. Smith vs. Dr. Jones etc. and St. John Jr.": "mr. smith vs. dr. jones etc. and st. john jr.",
    "a (big) [red] {blue} dog": "a -lrb- big -rrb- -lsb- red -rsb- -lcb- blue -rcb- dog",
    "well-known state-of-the-art - dash -- double --- triple": "well-known state-of-the-art dash double triple",
    "\"quoted\" 'single' `tick` ``double''": "quoted single tick double",
    "5'10\" tall 6ft 20th 1990s '90s": "5 10 tall 6ft 20th 1990s '90s",
    "hello... world.. end....": "hello world end",
    "the letter a.": "the letter a.",
    "plan b. Then": "plan b then",
    "1,000 people 10:30 3-4 -5 +5 1.5 .5": "1,000 people 10:30 3-4 -5 +5 1.5 .5",
    "rock 'n' roll o'clock '60s": "rock 'n' roll o'clock '60s",
    "yes!!! what?! no;yes a,b": "yes !!! what ?! no yes a b",
    "one\u2019s \u201cquoted\u201d it\u2019s": "one 's quoted it 's",
    "sand.The dog ran.": "sand.the dog ran",
    "no. 5 No.": "no. 5 no",
    "#1 @home &amp; ½ cup": "# 1 @home & 1/2 cup",
    "he'll could've shouldn't ain't I'm": "he 'll could 've should n't ai n't i 'm",
    "women's, men's' dogs'": "women 's men 's dogs",
    "éclair café 日本": "éclair café 日本",
    "": "",
    " . , ": "",
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_scores_on_given_tokens(case):
    scores = cider_d(
        [text.split() for text in case["tokenized_candidates"]],
        [[text.split() for text in own] for own in case["tokenized_references"]],
    )
    assert scores == pytest.approx(case["per_image"], abs=1e-9)
    assert sum(scores) / len(scores) == pytest.approx(case["cider"], abs=1e-9)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_tokens_and_scores_of_raw_captions(case):
    captions = [tokenize(text) for text in case["candidates"]]
    references = [[tokenize(text) for text in own] for own in case["references"]]
    assert [" ".join(tokens) for tokens in captions] == case["tokenized_candidates"]
    assert [[" ".join(tokens) for tokens in own] for own in references] == case["tokenized_references"]
    assert cider_d(captions, references) == pytest.approx(case["per_image"], abs=1e-9)


@pytest.mark.parametrize("text", TOKENS)
def test_tokens(text):
    assert " ".join(tokenize(text)) == TOKENS[text]


@pytest.mark.parametrize("blank", ["\n", "\r", "\r\n", "\t", "\v", "\f", "\x85", "\u2028", "  "])
def test_any_white_space_is_one_blank(blank):
    assert tokenize(f"{blank}a dog{blank}runs{blank}") == ["a", "dog", "runs"]


def test_what_scores_what():
    references = [[["a", "dog"]], [["two", "cats"]], [["red", "bus"]]]
    perfect = cider_d([own[0] for own in references], references)
    assert perfect == pytest.approx([5.0] * 3)  # two words have no three-grams
    assert cider_d([[], ["two", "cats"], ["red", "bus"]], references)[0] == 0
    repeated = cider_d([["dog"] * 8, ["two", "cats"], ["red", "bus"]], references)[0]
    assert repeated < perfect[0] / 4


def test_refuses_unequal_or_empty():
    with pytest.raises(ValueError, match="2 captions for 1 images"):
        cider_d([["a"], ["b"]], [[["a"]]])
    with pytest.raises(ValueError, match="image 1 has no references"):
        cider_d([["a"], ["b"]], [[["a"]], []])


def test_against_the_original_where_it_is_installed():
    pytest.importorskip("pycocoevalcap")
    if not shutil.which("java"):
        pytest.skip("no Java")
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer import ptbtokenizer

    texts = list(TOKENS)
    jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    command = [
        "java",
        "-cp",
        jar,
        "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines",
        "-lowerCase",
        "/dev/stdin",
    ]
    lines = subprocess.run(command, input="\n".join(texts), capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    filtered = [" ".join(w for w in line.split() if w not in ptbtokenizer.PUNCTUATIONS) for line in lines]
    assert filtered[: len(texts)] == list(TOKENS.values())
    case = CASES[0]
    own = [case["tokenized_references"], case["tokenized_candidates"]]
    truth, said = dict(enumerate(own[0])), {i: [text] for i, text in enumerate(own[1])}
    assert Cider().compute_score(truth, said)[1] == pytest.approx(case["per_image"], abs=1e-9)
