"""Figures, their intervals, and the paired tests, against hand arithmetic and plain restatements."""

import pickle
import random

import pytest

from vlmflow.tasks import TASKS, Outcome, Picture, Sample, TaskError
from vlmflow.tasks.cider import cider_d, tokenize


def sample(key: str, **fields) -> Sample:
    image = fields.pop("image", key)
    return Sample(key, (Picture(image, b""),), **fields)


# -- accuracy and POPE


def test_accuracy():
    task = TASKS["scienceqa"]
    samples = [sample(str(i), choices=("x", "y"), answer="A") for i in range(10)]
    metric = task.metric([task.outcome(s, text) for s, text in zip(samples, ["A"] * 6 + ["B"] * 3 + [""], strict=True)])
    assert metric["figure"] == "accuracy"
    assert metric["value"] == pytest.approx(60)
    low, high = metric["interval"]
    assert 20 <= low < 60 < high <= 100
    assert (metric["n"], metric["images"], metric["unparsed"], metric["excluded"]) == (10, 10, 1, 0)
    assert "groups" not in metric


def test_pope_figures():
    task = TASKS["pope"]
    said = {  # (right answer, said): by split
        "random": [("yes", "yes"), ("yes", "Yes."), ("yes", "no"), ("no", "no"), ("no", "no"), ("no", "yes")],
        "popular": [("yes", "yes"), ("yes", "hm"), ("yes", "no"), ("no", "hm"), ("no", "yes")],
        "adversarial": [("no", "no"), ("no", "no")],
    }
    outcomes = [
        task.outcome(sample(f"{group}/{i}", answer=truth, group=group, image=str(i)), text)
        for group, pairs in said.items()
        for i, (truth, text) in enumerate(pairs)
    ]
    metric = task.metric(outcomes)
    splits = metric["splits"]
    assert splits["random"] == pytest.approx(
        {"accuracy": 400 / 6, "precision": 200 / 3, "recall": 200 / 3, "f1": 200 / 3, "yes_ratio": 50}
    )
    assert splits["popular"] == pytest.approx(
        {"accuracy": 20, "precision": 50, "recall": 100 / 3, "f1": 40, "yes_ratio": 40}
    )
    assert splits["adversarial"] == {"accuracy": 100, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}
    assert metric["mean_f1"] == pytest.approx((200 / 3 + 40 + 0) / 3)
    assert metric["overall"] == pytest.approx(
        {"accuracy": 700 / 13, "precision": 60, "recall": 50, "f1": 600 / 11, "yes_ratio": 500 / 13}
    )
    assert metric["value"] == metric["overall"]["accuracy"]
    assert (metric["figure"], metric["n"], metric["images"], metric["unparsed"]) == ("accuracy", 13, 6, 2)


# -- captions


def test_captions():
    task = TASKS["nocaps"]
    texts = ["a dog runs on grass", "two cats sleep", "a red bus in town", "a man rides a horse"]
    groups = ["in-domain", "in-domain", "out-domain", "out-domain"]
    samples = [
        sample(str(i), references=(text, f"{text} today"), group=group)
        for i, (text, group) in enumerate(zip(texts, groups, strict=True))
    ]
    said = [texts[0], "Two cats,\nsleep!", "", "a horse"]
    metric = task.metric([task.outcome(s, text) for s, text in zip(samples, said, strict=True)])
    scores = cider_d([tokenize(text) for text in said], [[tokenize(r) for r in s.references] for s in samples])
    assert metric["figure"] == "CIDEr"
    assert metric["value"] == pytest.approx(100 * sum(scores) / 4)
    assert metric["groups"]["in-domain"] == pytest.approx(100 * sum(scores[:2]) / 2)
    assert scores[2] == 0
    assert (metric["tokenizer"], metric["unparsed"], metric["n"]) == ("ptb-regex", 1, 4)
    assert task.outcome(samples[0], "a dog").score is None


# -- judged answers


def test_mmvet_figures():
    task = TASKS["mmvet"]
    abilities = ["rec", "rec+ocr", "rec+ocr", "math"]
    verdicts = [(1.0,), (0.4,), None, (0.0,)]
    outcomes = [
        task.outcome(sample(str(i), group=group), "x", verdict=verdict)
        for i, (group, verdict) in enumerate(zip(abilities, verdicts, strict=True))
    ]
    metric = task.metric(outcomes)
    assert metric["value"] == pytest.approx(140 / 3)
    assert (metric["n"], metric["excluded"], metric["unparsed"]) == (3, 1, 0)
    assert metric["abilities"] == pytest.approx({"rec": 70, "ocr": 40, "math": 0})
    assert metric["sets"] == pytest.approx({"rec": 100, "rec+ocr": 40, "math": 0})


def test_llava_bench_figures():
    task = TASKS["llava_bench"]
    verdicts = [(8.0, 4.0), (10.0, 10.0), None, (9.0, 3.0)]
    outcomes = [
        task.outcome(sample(str(i), group=group), "x", verdict=verdict)
        for i, (group, verdict) in enumerate(zip(["conv", "conv", "conv", "detail"], verdicts, strict=True))
    ]
    metric = task.metric(outcomes)
    assert metric["value"] == pytest.approx(100 * 17 / 27)  # a ratio of means, not a mean of ratios
    assert metric["categories"] == pytest.approx({"conv": 100 * 14 / 18, "detail": 100 / 3})
    assert (metric["reference_mark"], metric["mark"]) == (9, pytest.approx(17 / 3))
    assert metric["excluded"] == 1


@pytest.mark.parametrize("name", ["mmvet", "llava_bench"])
def test_no_verdict_at_all(name):
    task = TASKS[name]
    metric = task.metric([task.outcome(sample("1", group="conv"), "x")])
    assert (metric["value"], metric["interval"], metric["n"], metric["excluded"]) == (None, None, 0, 1)


def test_judged_replies():
    read = TASKS["mmvet"].rubric.read
    assert [read(reply) for reply in ("0.5", " 1.0\n", "0.3 because", "1.5", "-0.1", "", "good", "nan")] == [
        (0.5,), (1.0,), (0.3,), None, None, None, None, None,
    ]  # fmt: skip
    read = TASKS["llava_bench"].rubric.read
    for reply, marks in (("8 7\nWell", (8, 7)), ("8, 7", (8, 7)), (" 8;7.5", (8, 7.5))):
        assert read(reply) == marks
    for reply in ("8", "8 7 6", "0 5", "11 5", "", "eight 7", "nan 1"):
        assert read(reply) is None


def test_judge_messages():
    llava = TASKS["llava_bench"].rubric
    asked = sample("1", question="What {x}?", context="A dog.\nIt runs.", references=("It is a dog.",), group="conv")
    system, user = llava.messages(asked, "A {cat}.")
    assert system == {
        "role": "system",
        "content": "You are a helpful and precise assistant for checking the quality of the answer.",
    }
    assert user["content"].startswith(
        "[Context]\nA dog.\nIt runs.\n\n[Question]\nWhat {x}?\n\n"
        "[Assistant 1]\nIt is a dog.\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nA {cat}.\n\n[End of Assistant 2]\n\n[System]\nWe would like to request your feedback"
    )
    assert user["content"].endswith("does not affect your judgment.\n\n")
    mmvet = TASKS["mmvet"].rubric
    asked = sample("1", question="What is x?", answer="-1<AND>-5")
    (user,) = mmvet.messages(asked, "x = 1")
    assert user["role"] == "user"
    assert user["content"].startswith("Compare the ground truth and prediction from AI models, to give a correctness")
    assert "\n\nQuestion | Ground truth | Prediction | Correctness\n--- | --- | --- | ---\n" in user["content"]
    assert user["content"].endswith(" | 1.0\n\nWhat is x? | -1 <AND> -5 | x = 1 | ")
    assert mmvet.messages(asked, "x = 1", again=True)[0]["content"].endswith(
        " | \nPredict the correctness of the answer (digit): "
    )


# -- two methods


def test_compare():
    task = TASKS["scienceqa"]
    samples = [sample(str(i), choices=("x", "y"), answer="A", image=str(i // 2)) for i in range(60)]
    first = [task.outcome(s, "A" if i % 3 else "B") for i, s in enumerate(samples)]
    second = [task.outcome(s, "A" if i % 3 or i < 20 else "") for i, s in enumerate(samples)]
    random.Random(0).shuffle(second)  # matched by id, not by place
    result = task.compare(first, second)
    assert result["difference"] == pytest.approx(100 * 7 / 60)
    assert result["p_mcnemar"] == pytest.approx(2 / 2**7)
    assert (result["n"], result["images"], result["figure"]) == (60, 30, "accuracy")
    assert result["interval"][0] < result["difference"] < result["interval"][1]
    assert task.compare(second, first)["difference"] == pytest.approx(-100 * 7 / 60)
    with pytest.raises(TaskError, match=r"scienceqa: the two methods answer different samples \(60 and 59; '"):
        task.compare(first, second[1:])
    with pytest.raises(TaskError, match=r"some of them twice"):
        task.compare(first, [*second, second[0]])


def test_compare_where_scores_are_no_right_or_wrong():
    task = TASKS["llava_bench"]
    samples = [sample(str(i), group="conv") for i in range(20)]
    first = [task.outcome(s, "x", verdict=(8.0, 4.0 + i % 3)) for i, s in enumerate(samples)]
    second = [task.outcome(s, "x", verdict=(9.0, 7.0) if i else None) for i, s in enumerate(samples)]
    result = task.compare(first, second)
    assert result["p_mcnemar"] is None
    assert result["n"] == 19  # what has no verdict in one is left out of both
    assert result["difference"] == pytest.approx(100 * (7 / 9 - sum(4 + i % 3 for i in range(1, 20)) / (8 * 19)))
    assert TASKS["nocaps"].compare(*[[Outcome(sample("1", references=("a dog",)), "a", "a", None)]] * 2)["n"] == 1


def test_nothing_to_measure():
    with pytest.raises(TaskError, match="pope: no answers to measure"):
        TASKS["pope"].metric([])


def test_tasks_travel_to_other_processes():
    for name, task in TASKS.items():
        assert pickle.loads(pickle.dumps(task)).name == name
