"""Every loader on small files in exactly the formats that it reads, and on broken ones."""

import base64
import io
import json
import socket
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from commands import vlmflow
from vlmflow.core.images import ImageError
from vlmflow.records.files import RecordError
from vlmflow.tasks import TASKS, Picture, Sample, Source, TaskError
from vlmflow.tasks.sample import LETTERS

COLOURS = ["red", "green", "blue", "white"]


def write_image(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), colour).save(path)
    return path


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def write_lines(path: Path, rows: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(file, "PNG")
    return file.getvalue()


def colour_of(sample: Sample) -> tuple[int, ...]:
    """The colour of a sample's only image."""
    (picture,) = sample.images
    return picture.open().getpixel((1, 1))  # pyright: ignore[reportReturnType]


RED, GREEN, BLUE = (255, 0, 0), (0, 128, 0), (0, 0, 255)


MANY = [str(number) for number in range(27)]  # more choices than letters


# -- ScienceQA

PROBLEM = {
    "question": "Which is it?", "choices": ["a", "b", "c"], "answer": 1, "hint": "Look.\nTwice.", "image": "image.png",
    "task": "closed choice", "grade": "grade2", "subject": "x", "topic": "x", "category": "x", "skill": "x",
    "lecture": "", "solution": "", "split": "test",
}  # fmt: skip


def test_scienceqa_problems(tmp_path):
    problems = {
        "5": PROBLEM,
        "6": {**PROBLEM, "image": None},
        "7": {**PROBLEM, "split": "train"},
        "11": {**PROBLEM, "hint": "", "answer": 0},
    }
    write_json(tmp_path / "problems.json", problems)
    write_image(tmp_path / "images" / "test" / "5" / "image.png", "red")
    write_image(tmp_path / "images" / "test" / "11" / "image.png", "blue")
    first, second = TASKS["scienceqa"].samples(Source(tmp_path))
    assert (first.id, first.question, first.choices) == ("5", "Which is it?", ("a", "b", "c"))
    assert (first.answer, first.context) == ("B", "Look.\nTwice.")
    assert (second.id, second.answer, second.context) == ("11", "A", "")
    assert (colour_of(first), colour_of(second)) == (RED, BLUE)
    elsewhere = write_json(tmp_path / "elsewhere" / "problems.json", {"5": PROBLEM})
    assert TASKS["scienceqa"].samples(Source(elsewhere, images=tmp_path / "images"))[0] == first
    write_json(tmp_path / "problems.json", {"5": {**PROBLEM, "choices": MANY, "answer": 26}})
    with pytest.raises(TaskError, match=r"problems.json, '5': 'choices' may be at most 26, .* got 27"):
        TASKS["scienceqa"].samples(Source(tmp_path))
    (tmp_path / "problems.json").write_text(f'{{"5": {json.dumps(PROBLEM)}, "5": {json.dumps(PROBLEM)}}}')
    with pytest.raises(RecordError, match=r"problems.json: holds '5' twice in one object"):
        TASKS["scienceqa"].samples(Source(tmp_path))


def test_scienceqa_paper_file(tmp_path):
    def record(key: str, asked: str, answer: str) -> dict[str, object]:
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        return {"id": key, "image": f"{key}/image.png", "conversations": turns}

    hinted = "<image>\nContext: Look.\nTwice.\nWhich is it?\nA. a\nB. b\nC. c"
    file = write_json(
        tmp_path / "himap-inference-MCQ.json",
        [record("5", hinted, "B"), record("11", "<image>\nName\nthe shape.\nA. a\nB. b", "A")],
    )
    for key in ("5", "11"):
        write_image(tmp_path / "test" / key / "image.png")
    for source in (Source(file), Source(tmp_path), Source(file, images=tmp_path / "test")):
        first, second = TASKS["scienceqa"].samples(source)
        assert (first.context, first.question, first.answer) == ("Look.\nTwice.", "Which is it?", "B")
        assert first.choices == ("a", "b", "c")
        assert (second.context, second.question, second.choices) == ("", "Name\nthe shape.", ("a", "b"))
        assert TASKS["scienceqa"].prompt(first, "llava").startswith(hinted.removeprefix("<image>\n"))
    for asked, answer, message in (
        ("<image>\nNo choices", "A", "must end in lines 'A. ...', 'B. ...'"),
        ("<image>\nx\nA. a\nC. c", "A", "must end in lines"),
        ("\n".join(["<image>", "x", *(f"{mark}. a" for mark in LETTERS), "a"]), "A", "must end in lines"),
        ("<image>\nx\nA. a\nB. b", "C", "answer is 'C', but there are 2 choices"),
    ):
        write_json(file, [record("5", asked, answer)])
        with pytest.raises(TaskError, match=rf"MCQ.json, list\[0\]: .*{message}"):
            TASKS["scienceqa"].samples(Source(file))


# -- VLMEvalKit's TSV


def write_tsv(path: Path, columns: list[str], rows: list[list[str]]) -> Path:
    """As pandas writes it: tabs, quotes doubled inside quotes where a cell needs them."""

    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in '\t\n"') else text

    path.write_text("".join("\t".join(map(cell, row)) + "\n" for row in [columns, *rows]), encoding="utf-8")
    return path


def encoded(colour: str, padding: int = 0) -> str:
    return base64.b64encode(png(colour) + b"\0" * padding).decode()


@pytest.mark.parametrize("name", ["scienceqa", "aokvqa"])
def test_multiple_choice_tsv(tmp_path, name):
    file = write_tsv(
        tmp_path / "x.tsv",
        ["index", "question", "hint", "A", "B", "C", "D", "answer", "image"],
        [
            ["3", 'Say "what"\nnow?', "Look.", "a", "b", "", "", "B", encoded("red", padding=200_000)],
            ["4", "Which?", "", "a", "b", "c", "d", "D", "3"],
            ["9", "Which?", "", "a", "b", "c", "d", "A", str([encoded("blue")])],
        ],
    )
    first, second, third = TASKS[name].samples(Source(file))
    assert (first.id, first.question, first.choices, first.answer) == ("3", 'Say "what"\nnow?', ("a", "b"), "B")
    assert first.context == ("Look." if name == "scienceqa" else "")
    assert (second.choices, second.answer) == (("a", "b", "c", "d"), "D")
    assert first.images == second.images != third.images
    assert (colour_of(first), colour_of(second), colour_of(third)) == (RED, RED, BLUE)


def test_broken_tsv(tmp_path):
    columns = ["index", "question", "A", "B", "answer", "image"]
    first, good = (["1", "Which?", "a", "b", "B", encoded("red")], ["2", "Which?", "a", "b", "B", encoded("red")])
    for row, message in (
        (good[:-1], "line 3: 5 cells for 6 columns"),
        ([*good[:4], "C", good[5]], "line 3: 'answer' is 'C', but there are 2 choices"),
        ([*good[:5], "not base 64!"], "line 3: 'image' is not base 64"),
        ([*good[:5], ""], "line 3: no image"),
        (["2", "", *good[2:]], "line 3: 'question' is missing"),
        (first, "line 3: id '1' is taken by .*line 2"),
    ):
        file = write_tsv(tmp_path / "x.tsv", columns, [first, row])
        with pytest.raises(TaskError, match=rf"x.tsv, {message}"):
            TASKS["scienceqa"].samples(Source(file))
    (tmp_path / "empty.tsv").write_text("")
    with pytest.raises(TaskError, match=r"scienceqa: no samples in .*empty.tsv"):
        TASKS["scienceqa"].samples(Source(tmp_path / "empty.tsv"))


# -- A-OKVQA

AOKVQA = {
    "split": "val", "image_id": 299207, "question_id": "22jbM6gDxdaMaunuzgrsBB", "question": "What is in the bag?",
    "choices": ["fish", "meat", "fruit", "eggs"], "correct_choice_idx": 2, "direct_answers": ["fruit"],
    "difficult_direct_answer": False, "rationales": ["x"],
}  # fmt: skip


def test_aokvqa(tmp_path):
    file = write_json(tmp_path / "aokvqa" / "aokvqa_v1p0_val.json", [AOKVQA])
    write_image(tmp_path / "coco" / "val2017" / "000000299207.jpg", "blue")
    expected = ("22jbM6gDxdaMaunuzgrsBB", "What is in the bag?", ("fish", "meat", "fruit", "eggs"), "C")
    for source in (Source(file.parent, tmp_path / "coco"), Source(file, tmp_path / "coco" / "val2017")):
        (sample,) = TASKS["aokvqa"].samples(source)
        assert (sample.id, sample.question, sample.choices, sample.answer) == expected
        assert colour_of(sample)[2] > 200
    for change, message in (
        ({"correct_choice_idx": 4}, "'correct_choice_idx' is 4, but there are 4 choices"),
        ({"correct_choice_idx": None}, "the test split has no public answers"),
        ({"correct_choice_idx": "2"}, "'correct_choice_idx' must be a whole number, got '2'"),
        ({"choices": "fish"}, "'correct_choice_idx' is 2, but there are 1 choices"),
        ({"choices": [1, 2]}, "'choices' must be a list of texts"),
        ({"choices": MANY}, "'choices' may be at most 26, .* got 27"),
        ({"image_id": 1}, "image 000000000001.jpg not found in .*coco"),
        ({"question": ["x"]}, "'question' must be text"),
    ):
        write_json(file, [AOKVQA, {**AOKVQA, "question_id": "2", **change}])
        with pytest.raises(TaskError, match=rf"val.json, list\[1\]: .*{message}"):
            TASKS["aokvqa"].samples(Source(file, tmp_path / "coco"))
    with pytest.raises(TaskError, match=r"holds none of aokvqa_v1p0_test.json"):
        TASKS["aokvqa"].samples(Source(file.parent, split="test"))


# -- POPE


def pope_rows(image: str = "COCO_val2014_000000310196.jpg") -> list[object]:
    return [
        {"question_id": 1, "image": image, "text": "Is there a snowboard in the image?", "label": "yes"},
        {"question_id": 2, "image": image, "text": "Is there a car in the image?", "label": "no"},
    ]


def test_pope(tmp_path):
    for split in ("random", "popular", "adversarial"):
        write_lines(tmp_path / f"coco_pope_{split}.json", pope_rows())
    write_image(tmp_path / "coco" / "val2014" / "COCO_val2014_000000310196.jpg")
    task = TASKS["pope"]
    samples = task.samples(Source(tmp_path, tmp_path / "coco"))
    assert [s.id for s in samples] == [f"{g}/{i}" for g in ("random", "popular", "adversarial") for i in (1, 2)]
    assert [s.answer for s in samples] == ["yes", "no"] * 3
    assert len({s.images for s in samples}) == 1
    assert {s.group for s in task.samples(Source(tmp_path, tmp_path / "coco", split="popular"))} == {"popular"}
    one = task.samples(Source(tmp_path / "coco_pope_random.json", tmp_path / "coco" / "val2014"))
    assert {s.group for s in one} == {"random"}
    own = write_lines(tmp_path / "mine.json", pope_rows())
    assert {s.group for s in task.samples(Source(own, tmp_path / "coco"))} == {"mine"}
    assert len(task.samples(Source(own, tmp_path / "coco"), limit=1)) == 1
    with pytest.raises(TaskError, match="split must be one of random, popular, adversarial, got 'x'"):
        task.samples(Source(tmp_path, split="x"))
    (tmp_path / "coco_pope_popular.json").unlink()
    with pytest.raises(TaskError, match=r"coco_pope_popular.json: no such file"):
        task.samples(Source(tmp_path, tmp_path / "coco"))


def test_pope_tsv(tmp_path):
    file = write_tsv(
        tmp_path / "POPE.tsv",
        ["index", "image", "question", "answer", "category"],
        [
            ["0", encoded("red"), "Is there a dog?", "Yes", "random,popular,adversarial"],
            ["1", "0", "Is there a cat?", "No", "popular"],
        ],
    )
    samples = TASKS["pope"].samples(Source(file))
    assert [(s.id, s.group, s.answer) for s in samples] == [
        ("random/0", "random", "yes"),
        ("popular/0", "popular", "yes"),
        ("adversarial/0", "adversarial", "yes"),
        ("popular/1", "popular", "no"),
    ]
    assert colour_of(samples[3]) == RED


def test_broken_lines(tmp_path):
    write_image(tmp_path / "x.jpg")
    file = tmp_path / "coco_pope_random.json"
    good = json.dumps(pope_rows("x.jpg")[0])
    for line, message in (
        ('{"question_id": 2, "image"', "line 3, column 27: broken JSON"),
        ("[1]", r"line 3: must be a JSON object, got \[1\]"),
        ('{"question_id": 2, "image": "x.jpg", "text": "?"}', r"line 3: 'label' is missing \(there are: question_id, "),
        ('{"question_id": 2, "image": "x.jpg", "text": "?", "label": null}', "line 3: 'label' is null"),
        ('{"question_id": 2, "image": "x.jpg", "text": "?", "label": "maybe"}', "line 3: 'label' must be yes or no"),
        ('{"question_id": 2, "image": "y.jpg", "text": "?", "label": "no"}', "line 3: image y.jpg not found in"),
        (good, "line 3: id 'random/1' is taken by .*line 1"),
    ):
        file.write_text(f"{good}\n\n{line}\n")
        with pytest.raises((TaskError, RecordError), match=rf"coco_pope_random.json, {message}"):
            TASKS["pope"].samples(Source(file))
    file.write_text("\n")
    with pytest.raises(TaskError, match=r"pope: no samples in .*coco_pope_random.json"):
        TASKS["pope"].samples(Source(file))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(RecordError, match=r"coco_pope_random.json: is not UTF-8"):
        TASKS["pope"].samples(Source(file))
    with pytest.raises(TaskError, match=r"nowhere: no such file or folder"):
        TASKS["pope"].samples(Source(tmp_path / "nowhere"))


# -- captions


def test_nocaps(tmp_path):
    whole = {
        "info": {}, "licenses": [],
        "images": [
            {"id": 0, "open_images_id": "a", "file_name": "a.jpg", "coco_url": "x", "domain": "near-domain"},
            {"id": 1, "open_images_id": "b", "file_name": "b.jpg", "coco_url": "x", "domain": "in-domain"},
        ],
        "annotations": [
            {"image_id": 0, "id": 0, "caption": "A baby."},
            {"image_id": 1, "id": 1, "caption": "A bus."},
            {"image_id": 0, "id": 2, "caption": "A child."},
        ],
    }  # fmt: skip
    file = write_json(tmp_path / "nocaps_val_4500_captions.json", whole)
    write_image(tmp_path / "val" / "a.jpg")
    write_image(tmp_path / "val" / "b.jpg")
    first, second = TASKS["nocaps"].samples(Source(tmp_path))
    assert (first.id, first.references, first.group) == ("0", ("A baby.", "A child."), "near-domain")
    assert (second.id, second.references, second.group) == ("1", ("A bus.",), "in-domain")
    write_json(file, {**whole, "annotations": whole["annotations"][:1]})
    with pytest.raises(TaskError, match=r"captions.json, images\[1\]: image 1 has no captions"):
        TASKS["nocaps"].samples(Source(file))
    write_json(file, [])
    with pytest.raises(RecordError, match=r"captions.json: must be a JSON object"):
        TASKS["nocaps"].samples(Source(file))
    file.write_text('{"images": [,]}')
    with pytest.raises(RecordError, match=r"captions.json, line 1, column 13: broken JSON"):
        TASKS["nocaps"].samples(Source(file))


def test_flickr30k(tmp_path):
    def entry(number: int, split: str) -> dict[str, object]:
        sentences = [{"raw": f"Caption {number}.", "tokens": ["caption"], "imgid": number, "sentid": 0}]
        return {"sentids": [0], "imgid": number, "sentences": sentences, "split": split, "filename": f"{number}.jpg"}

    whole = {"images": [entry(0, "train"), entry(1, "test"), entry(2, "val")], "dataset": "flickr30k"}
    write_json(tmp_path / "dataset_flickr30k.json", whole)
    for number in range(3):
        write_image(tmp_path / "flickr30k-images" / f"{number}.jpg")
    (sample,) = TASKS["flickr30k"].samples(Source(tmp_path))
    assert (sample.id, sample.references) == ("1", ("Caption 1.",))
    assert len(TASKS["flickr30k"].samples(Source(tmp_path, split="all"))) == 3
    with pytest.raises(TaskError, match=r"flickr30k: no samples in .*'split': 'none'"):
        TASKS["flickr30k"].samples(Source(tmp_path, split="none"))


# -- open answers


def test_llava_bench(tmp_path):
    questions = [
        {"question_id": 0, "image": "001.jpg", "text": "What is it?", "category": "conv"},
        {"question_id": 1, "image": "001.jpg", "text": "Describe it.", "category": "detail"},
    ]
    write_lines(tmp_path / "questions.jsonl", questions)
    write_lines(tmp_path / "context.jsonl", [{"id": "001", "image": "001.jpg", "caption": ["A dog.", "It runs."]}])
    answers = [{"question_id": i, "answer_id": "x", "text": f"Answer {i}.", "model_id": "gpt-4"} for i in (0, 1)]
    write_lines(tmp_path / "answers_gpt4.jsonl", answers)
    write_image(tmp_path / "images" / "001.jpg")
    first, second = TASKS["llava_bench"].samples(Source(tmp_path))
    assert (first.id, first.question, first.context) == ("0", "What is it?", "A dog.\nIt runs.")
    assert (first.references, first.group, second.group) == (("Answer 0.",), "conv", "detail")
    context = json.loads((tmp_path / "context.jsonl").read_text())
    for name, rows, message in (
        (
            "context.jsonl",
            [context, {**context, "caption": "A cat."}],
            "line 2: 'image' '001.jpg' is taken by .*line 1",
        ),
        ("answers_gpt4.jsonl", [*answers, answers[0]], "line 3: 'question_id' '0' is taken by .*line 1"),
    ):
        intact = (tmp_path / name).read_text()
        write_lines(tmp_path / name, rows)
        with pytest.raises(TaskError, match=rf"{name}, {message}"):
            TASKS["llava_bench"].samples(Source(tmp_path))
        (tmp_path / name).write_text(intact)
    write_lines(tmp_path / "answers_gpt4.jsonl", answers[:1])
    with pytest.raises(TaskError, match=r"questions.jsonl, line 2: question 1 .* has no entry in answers_gpt4.jsonl"):
        TASKS["llava_bench"].samples(Source(tmp_path))
    write_lines(tmp_path / "questions.jsonl", [{**questions[0], "category": "talk"}])
    with pytest.raises(TaskError, match="line 1: 'category' must be one of conv, detail, complex, got 'talk'"):
        TASKS["llava_bench"].samples(Source(tmp_path))


def test_llava_bench_tsv(tmp_path):
    columns = ["index", "question", "caption", "gpt4_ans", "category", "image"]
    file = write_tsv(tmp_path / "x.tsv", columns, [["7", "What?", "A dog.", "It is a dog.", "complex", encoded("red")]])
    (sample,) = TASKS["llava_bench"].samples(Source(file))
    assert (sample.id, sample.context, sample.references, sample.group) == (
        "7", "A dog.", ("It is a dog.",), "complex",
    )  # fmt: skip


def test_mmvet(tmp_path):
    entry = {
        "imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>-5", "imagesource": "x",
        "capability": ["math", "ocr"],
    }  # fmt: skip
    write_json(tmp_path / "mm-vet.json", {"v1_0": entry, "v1_1": {**entry, "capability": ["rec"]}})
    write_image(tmp_path / "images" / "v1_0.png")
    first, second = TASKS["mmvet"].samples(Source(tmp_path))
    assert (first.id, first.answer, first.group, second.group) == ("v1_0", "-1<AND>-5", "ocr+math", "rec")
    write_json(tmp_path / "mm-vet.json", {"v1_0": {**entry, "capability": ["sing"]}})
    with pytest.raises(TaskError, match=r"mm-vet.json, 'v1_0': abilities must be of rec, .* got 'sing'"):
        TASKS["mmvet"].samples(Source(tmp_path))
    (tmp_path / "mm-vet.json").write_text(f'{{"v1_0": {json.dumps(entry)}, "v1_0": {json.dumps(entry)}}}')
    with pytest.raises(RecordError, match=r"mm-vet.json: holds 'v1_0' twice in one object"):
        TASKS["mmvet"].samples(Source(tmp_path))
    write_json(tmp_path / "mm-vet.json", [entry])
    with pytest.raises(TaskError, match=r"mm-vet.json: must be an object of objects by id, got a list"):
        TASKS["mmvet"].samples(Source(tmp_path))
    columns = ["index", "image", "question", "answer", "category"]
    file = write_tsv(tmp_path / "MMVet.tsv", columns, [["3", encoded("red"), "What is x?", "5", "rec,know,gen"]])
    assert TASKS["mmvet"].samples(Source(file))[0].group == "rec+know+gen"


# -- your own questions


def test_jsonl(tmp_path):
    for name in ("a.png", "b.png"):
        write_image(tmp_path / name)
    rows = [
        {"image": "a.png", "question": "What?", "answer": ["dog", "puppy"]},
        {"image": ["a.png", str(tmp_path / "b.png")], "question": "Which?", "answer": "two", "choices": ["one", "two"]},
        {"id": "mine", "image": "a.png", "question": "Which?", "answer": "A", "choices": ["1", "2"], "group": "g"},
    ]
    file = write_lines(tmp_path / "mine.jsonl", rows)
    first, second, third = TASKS["jsonl"].samples(Source(file))
    assert (first.id, first.references, first.choices) == ("0", ("dog", "puppy"), ())
    assert (second.id, len(second.images), second.answer) == ("1", 2, "B")
    assert (third.id, third.answer, third.group) == ("mine", "A", "g")
    for answer in ("three", "AB", "", "C"):
        write_lines(file, [{**rows[1], "answer": answer}])
        with pytest.raises(TaskError, match=rf"mine.jsonl, line 1: 'answer' '{answer}' is neither a letter nor one of"):
            TASKS["jsonl"].samples(Source(file))
    write_lines(file, [{**rows[1], "choices": MANY, "answer": "26"}])
    with pytest.raises(TaskError, match=r"mine.jsonl, line 1: 'choices' may be at most 26, .* got 27"):
        TASKS["jsonl"].samples(Source(file))
    write_lines(file, [{"question": "What?", "answer": "dog"}])
    with pytest.raises(TaskError, match=r"mine.jsonl, line 1: 'image' is missing \(there are: question, answer\)"):
        TASKS["jsonl"].samples(Source(file))
    with pytest.raises(TaskError, match="jsonl: needs the path"):
        TASKS["jsonl"].samples()


def test_broken_image_fails_when_opened(tmp_path):
    (tmp_path / "a.png").write_bytes(png("red")[:40])
    (tmp_path / "b.png").write_text("no image")
    file = write_lines(tmp_path / "x.jsonl", [{"image": n, "question": "?", "answer": "x"} for n in ("a.png", "b.png")])
    for sample in TASKS["jsonl"].samples(Source(file)):
        with pytest.raises(ImageError, match=rf"{sample.images[0].name} is (broken|no image)"):
            sample.images[0].open()
    assert Picture("grey", lambda: Image.new("L", (2, 2))).open().mode == "RGB"


# -- the hub

HUB_ROWS = {
    "scienceqa": [
        {**{k: v for k, v in PROBLEM.items() if k not in ("split", "image")}, "image": "red"},
        {**{k: v for k, v in PROBLEM.items() if k not in ("split", "image")}, "image": None},
        {**{k: v for k, v in PROBLEM.items() if k not in ("split", "image")}, "image": "blue", "answer": 2},
    ],
    "aokvqa": [{**{k: v for k, v in AOKVQA.items() if k not in ("split", "image_id")}, "image": "red"}],
    "pope": [
        {
            "id": str(i), "question_id": "1", "question": "Is there a dog in the image?", "answer": "yes",
            "image_source": "COCO_val2014_1", "image": "red", "category": category,
        }
        for i, category in enumerate(["adversarial", "random"])
    ],
    "nocaps": [
        {
            "image": "red", "image_coco_url": "x", "image_file_name": "a.jpg", "image_id": 7,
            "annotations_ids": [0, 1], "annotations_captions": ["A baby.", "A child."],
        }
    ],
    "flickr30k": [
        {"image": "red", "caption": ["A.", "B."], "sentids": ["0", "1"], "img_id": "12", "filename": "12.jpg"}
    ],
    "llava_bench": [
        {
            "image": "red", "question_id": 3, "question": "What?", "caption": "A dog.", "gpt_answer": "A dog!",
            "category": "conv", "image_id": "001.jpg",
        }
    ],
    "mmvet": [
        {"image": "red", "question_id": "v1_0", "question": "What is x?", "answer": "5", "capability": "ocr,math"}
    ],
}  # fmt: skip
SPLITS = {
    "scienceqa": "test", "aokvqa": "validation", "pope": "test", "nocaps": "validation", "flickr30k": "test",
    "llava_bench": "train", "mmvet": "test",
}  # fmt: skip
IDS = {
    "scienceqa": ["0", "2"], "aokvqa": ["22jbM6gDxdaMaunuzgrsBB"], "pope": ["adversarial/0", "random/1"],
    "nocaps": ["7"], "flickr30k": ["12"], "llava_bench": ["3"], "mmvet": ["v1_0"],
}  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The data sets package with its cache in a folder of the test."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


@pytest.mark.parametrize("name", HUB_ROWS)
def test_hub_columns(tmp_path, hub, name):
    rows = [{**row, "image": row["image"] and {"bytes": png(row["image"]), "path": None}} for row in HUB_ROWS[name]]
    table = hub.Dataset.from_list(rows).cast_column("image", hub.Image())
    (tmp_path / "set").mkdir()
    table.to_parquet(tmp_path / "set" / f"{SPLITS[name]}-00000-of-00001.parquet")
    samples = TASKS[name].samples(Source(hub=str(tmp_path / "set")))
    assert [sample.id for sample in samples] == IDS[name]
    assert colour_of(samples[0]) == RED
    if name == "scienceqa":
        assert (samples[1].answer, colour_of(samples[1])) == ("C", BLUE)
    if name == "pope":
        assert samples[0].images == samples[1].images
    if name == "nocaps":
        assert samples[0].references == ("A baby.", "A child.")
    table.remove_columns(["question" if "question" in table.column_names else "image"]).to_parquet(
        tmp_path / "set" / f"{SPLITS[name]}-00000-of-00001.parquet"
    )
    with pytest.raises(TaskError, match=r"row 0: 'question' is missing|column 'image' is missing"):
        TASKS[name].samples(Source(hub=str(tmp_path / "set")))


def test_hub_names(monkeypatch, hub):
    asked = []

    def refuse(path, name, split, revision):
        asked.append((path, name, split, revision))
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(hub, "load_dataset", refuse)
    former, other = Source(hub="lmms-lab/ScienceQA", revision="abc"), Source(hub="me/mine", config="c", split="s")
    for source in (Source(), former, other):
        with pytest.raises(TaskError, match=r"ConnectionError: no network\); without a network, give a local copy"):
            TASKS["scienceqa"].samples(source)
    assert asked == [
        ("lmms-lab-encoder/ScienceQA", "ScienceQA-IMG", "test", None),
        ("lmms-lab/ScienceQA", "ScienceQA-IMG", "test", None),
        ("lmms-lab/ScienceQA", "ScienceQA-IMG", "test", "abc"),
        ("me/mine", "c", "s", None),
    ]


def test_a_moved_data_set_is_found_by_its_former_id(monkeypatch, hub):
    rows = [{**row, "image": {"bytes": png("red"), "path": None}} for row in HUB_ROWS["mmvet"]]
    table, asked = hub.Dataset.from_list(rows).cast_column("image", hub.Image()), []

    def only_the_former(path, name, split, revision):
        asked.append(path)
        if path == "lmms-lab/MMVet":
            return table
        raise hub.exceptions.DatasetNotFoundError(f"{path} is gone")

    monkeypatch.setattr(hub, "load_dataset", only_the_former)
    assert [sample.id for sample in TASKS["mmvet"].samples()] == IDS["mmvet"]
    assert asked == ["lmms-lab-encoder/MMVet", "lmms-lab/MMVet"]
    with pytest.raises(TaskError, match=r"me/mine \(default, test\): cannot be loaded .*me/mine is gone"):
        TASKS["mmvet"].samples(Source(hub="me/mine"))


def test_the_hubs_commit_is_recorded_and_another_one_is_another_run(monkeypatch, hub, tmp_path):
    rows = [{**row, "image": {"bytes": png("red"), "path": None}} for row in HUB_ROWS["pope"]]
    table = hub.Dataset.from_list(rows).cast_column("image", hub.Image())
    monkeypatch.setattr(hub, "load_dataset", lambda *_, **__: table)
    args = ["eval", "--task", "pope", "--max-new-tokens", "1", "--limit", "1", "--out", tmp_path / "out"]
    for commit in ("a" * 40, "b" * 40):
        table.info.download_checksums = {f"hf://datasets/lmms-lab/POPE@{commit}/Full/test-0.parquet": {"num_bytes": 1}}
        run = vlmflow(*args)
        assert run.returncode == (0 if commit[0] == "a" else 2)
    settings = json.loads((tmp_path / "out/summary.json").read_text())["settings"]
    assert settings["source"] == {"dataset": "lmms-lab-encoder/POPE", "split": "test", "commit": "a" * 40}
    assert f'source.commit was "{"a" * 40}", is "{"b" * 40}"' in run.stderr
    table.info.download_checksums = None  # from a folder
    (sample, *_) = TASKS["pope"].samples()
    assert sample.commit is None


def test_a_hub_that_does_not_answer_is_asked_once_and_what_was_downloaded_is_taken(monkeypatch, hub, caplog):
    from huggingface_hub import constants

    asked, table = [], hub.Dataset.from_list(HUB_ROWS["mmvet"]).cast_column("image", hub.Image())

    def load(path, **_):
        asked.append((path, hub.config.HF_HUB_OFFLINE))
        return table

    def never_downloaded(path, **_):
        raise ConnectionError(f"Couldn't reach {path!r}")

    monkeypatch.setattr(hub, "load_dataset", load)
    monkeypatch.setattr(hub.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("vlmflow.core.hub.ANSWER_WITHIN", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:  # which says nothing
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.perf_counter()
        TASKS["mmvet"].samples()
        assert asked == [("lmms-lab-encoder/MMVet", True)]
        monkeypatch.setattr(hub, "load_dataset", never_downloaded)
        with pytest.raises(TaskError, match=r"MMVet .*: cannot be loaded \(http://127.* cannot be reached \(\w+\)\); "):
            TASKS["mmvet"].samples()
        assert time.perf_counter() - start < 5
    assert hub.config.HF_HUB_OFFLINE is False
    assert caplog.messages == [f"vlmflow: asking {constants.ENDPOINT} for lmms-lab-encoder/MMVet"] * 2


def test_a_data_set_that_is_there_is_not_looked_for_elsewhere(monkeypatch, hub):
    asked = []

    def broken(path, name, split, revision):
        asked.append(path)
        raise ValueError(f"no split {split}")

    monkeypatch.setattr(hub, "load_dataset", broken)
    with pytest.raises(TaskError, match=r"cannot be loaded .*no split mine"):
        TASKS["mmvet"].samples(Source(split="mine"))
    assert asked == ["lmms-lab-encoder/MMVet"]


def test_all_splits_at_once_are_no_data_set(monkeypatch, hub):
    monkeypatch.setattr(hub, "load_dataset", lambda *_, **__: hub.DatasetDict())
    with pytest.raises(TaskError, match=r"lmms-lab-encoder/MMVet \(default, test\): split must name one split"):
        TASKS["mmvet"].samples()


def test_hub_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TaskError, match=r'pip install "vlmflow\[eval\]"'):
        TASKS["pope"].samples()


def test_records_say_where_samples_came_from():
    assert TASKS["scienceqa"].describe() == {
        "dataset": "lmms-lab-encoder/ScienceQA", "config": "ScienceQA-IMG", "split": "test",
    }  # fmt: skip
    assert TASKS["pope"].describe(Source(hub="lmms-lab/POPE", revision="abc")) == {
        "dataset": "lmms-lab/POPE", "split": "test", "revision": "abc",
    }  # fmt: skip
    assert TASKS["pope"].describe(Source(Path("a"), Path("b"))) == {"path": "a", "images": "b"}
    assert TASKS["easy_vqa"].describe() == {}
