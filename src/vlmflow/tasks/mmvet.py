"""MM-Vet: 218 open questions that need several abilities at once, marked by a judge from 0 to 1.

Source: MM-Vet (ICML 2024); data CC BY-NC 4.0, judge's prompt Apache-2.0. Table 2 of the paper, whose judge is
GPT-4o.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from vlmflow.tasks.core import Metric, Outcome, Rubric, marks_of, open_task
from vlmflow.tasks.prompts import question
from vlmflow.tasks.sample import Sample, TaskError
from vlmflow.tasks.sources import Hub, Record, Source, find_file, read_hub, read_table, read_tsv

HUB = Hub("lmms-lab-encoder/MMVet", split="test", former="lmms-lab/MMVet")
ABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")

_MEME = (
    "Can you explain this meme? | This meme is poking fun at the fact that the names of the countries Iceland and "
    "Greenland are misleading. Despite its name, Iceland is known for its beautiful green landscapes, while Greenland "
    "is mostly covered in ice and snow. The meme is saying that the person has trust issues because the names of "
    "these countries do not accurately represent their landscapes. | "
)
TEMPLATE = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. <AND> in "
    "the ground truth means it is totally right only when all elements in the ground truth are present in the "
    "prediction, and <OR> means it is totally right when any one element in the ground truth is present in the "
    "prediction. The correctness score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 "
    "(totally right). Just complete the last space of the correctness score.\n"
    "\n"
    "Question | Ground truth | Prediction | Correctness\n"
    "--- | --- | --- | ---\n"
    "What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 or 5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 or x = -5 | 1.0\n"
    f"{_MEME}The meme talks about Iceland and Greenland. It's pointing out that despite their names, Iceland is not "
    "very icy and Greenland isn't very green. | 0.4\n"
    f"{_MEME}The meme is using humor to point out the misleading nature of Iceland's and Greenland's names. Iceland, "
    "despite its name, has lush green landscapes while Greenland is mostly covered in ice and snow. The text 'This is "
    "why I have trust issues' is a playful way to suggest that these contradictions can lead to distrust or "
    "confusion. The humor in this meme is derived from the unexpected contrast between the names of the countries and "
    "their actual physical characteristics. | 1.0\n"
    "\n"
    "{question} | {truth} | {prediction} | "
)


def load(source: Source) -> Iterator[Sample]:
    """The hub, the official folder (mm-vet.json and images), or a VLMEvalKit TSV."""
    if source.path is None:
        for row in read_hub(HUB, source):
            yield _sample(row, row.text("question_id"), row.text("capability").split(","))
        return
    path = find_file(source.path, "mm-vet.json")
    if path.suffix == ".tsv":
        for row in read_tsv(path):
            yield _sample(row, row.text("index"), row.text("category").split(","))
        return
    folder = source.images or path.parent / "images"
    for row in read_table(path):
        yield _sample(row.with_image([folder], row.text("imagename")), row.text("key"), row.texts("capability"))


def _sample(row: Record, key: str, abilities: Sequence[str]) -> Sample:
    named = [ability.strip() for ability in abilities]
    if unknown := [ability for ability in named if ability not in ABILITIES]:
        raise TaskError(f"{row.origin}: abilities must be of {', '.join(ABILITIES)}, got {unknown[0]!r}")
    group = "+".join(ability for ability in ABILITIES if ability in named)
    return row.sample(key, question=row.text("question"), answer=row.text("answer"), group=group)


def lmms_prompt(sample: Sample) -> str:
    """lmms-eval's, which asks for reasoning first: another protocol, with other scores."""
    return (
        "First please perform reasoning, and think step by step to provide best answer to the following question: \n\n"
        f"{sample.question}"
    )


def fill(sample: Sample, answer: str) -> dict[str, str]:
    """The last row of the judge's table."""
    truth = sample.answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return {"question": sample.question, "truth": truth, "prediction": answer}


def read(reply: str) -> tuple[float, ...] | None:
    """The number from 0 to 1 that the reply begins with."""
    try:
        mark = float(reply.split()[0])
    except (IndexError, ValueError):
        return None
    return (mark,) if 0 <= mark <= 1 else None


def measure(outcomes: Sequence[Outcome]) -> Metric:
    """The mean mark in percent, the same for each ability, and for each set of abilities that questions need."""
    (marks,) = marks_of(outcomes, 1)
    metric = Metric.mean("score", marks)
    needs = [outcome.sample.group.split("+") for outcome in outcomes]
    having = {name: np.array([name in abilities for abilities in needs]) for name in ABILITIES}
    by_ability = {name: metric.over(chosen) for name, chosen in having.items() if chosen.any()}
    metric.details.update(abilities=by_ability, sets=metric.by_group(outcomes))
    return metric


MMVET = open_task(
    name="mmvet",
    title="MM-Vet",
    load=load,
    prompts={"paper": question, "lmms": lmms_prompt},
    measure=measure,
    max_new_tokens=1024,
    hub=HUB,
    rubric=Rubric(
        name="mm-vet-v1",
        template=TEMPLATE,
        fill=fill,
        read=read,
        max_tokens=3,
        nudge="\nPredict the correctness of the answer (digit): ",
        hotter=0.5,
    ),
)
