"""The recipe: stages in order, each a canvas, an object count and a number of steps."""

from __future__ import annotations

from dataclasses import dataclass

from vlmflow.pico.scenes import CANVAS, COUNTS

NO_QUESTIONS = (0, 0, 0)


@dataclass(frozen=True)
class CurriculumStage:
    """One stretch of training; learning rates are constant, then fall linearly over the last share ``decay`` of it.

    A stage without questions trains the vision tower, the projector and the word embeddings alone.
    """

    name: str
    canvas: int  # pixels
    counts: tuple[int, int]  # fewest and most objects of a scene
    steps: int
    scenes: int  # a step
    part: int  # scenes that are computed at once; gradients are summed over the parts of a step
    questions: tuple[int, int, int] = NO_QUESTIONS  # short ones, choices and captions a scene
    muon_rate: float = 0.02
    adam_rate: float = 2e-3
    tower_rate: float = 2e-4
    decay: float = 0.01
    focus: tuple[str, ...] = ()  # kinds of questions that are drawn three times as often as others
    easy_vqa: int = 0  # one part in so many is of easy-vqa's train split; 0 is none


SLOW = ("colour", "position", "count", "choice_colour", "choice_position")
SLOWER = ("position", "count")
SLOWEST = (*SLOWER, "choice_position", "choice_knowledge")
STAGES = (
    CurriculumStage("align", 96, (3, 5), 1200, 48, 12, NO_QUESTIONS, 0.03, 1.5e-3, decay=0.5),
    CurriculumStage("detect", 56, (1, 2), 300, 16, 4, (16, 0, 0)),
    CurriculumStage("choose", 96, (1, 4), 200, 16, 4, (12, 3, 1), 0.015, 1.5e-3),
    CurriculumStage("bind", 96, (1, 5), 262, 16, 4, (10, 5, 1), 0.015, 1.5e-3, focus=SLOW),
    CurriculumStage("absent", 56, (1, 3), 300, 16, 4, (16, 0, 0)),
    CurriculumStage("mix", 96, (1, 5), 384, 16, 4, (10, 5, 1), 0.015, 1.5e-3),
    CurriculumStage("all", 56, (1, 3), 700, 32, 8, (8, 3, 1), decay=0.2),
    CurriculumStage("more", 96, (1, 5), 274, 16, 4, (10, 5, 1), 0.015, 1.5e-3),
    CurriculumStage("letters", 56, (1, 3), 500, 16, 4, (3, 10, 3), decay=0.2),
    CurriculumStage("options", 56, (1, 3), 400, 16, 4, (5, 9, 2), 0.01, 1e-3, decay=0.7),
    CurriculumStage("wide", CANVAS, (1, 6), 300, 8, 2, (12, 8, 2), 0.01, 1e-3, easy_vqa=8),
    CurriculumStage("full", CANVAS, COUNTS, 750, 8, 2, (12, 8, 2), 0.01, 1e-3, decay=0.5, easy_vqa=8),
    CurriculumStage("judge", 56, (1, 3), 500, 16, 4, (6, 10, 0), 0.01, 1e-3, decay=0.3, focus=SLOWER),
    CurriculumStage("places", 96, (2, 6), 560, 16, 4, (7, 10, 1), 0.01, 1e-3, decay=0.3, focus=SLOWEST),
    CurriculumStage("whole", CANVAS, COUNTS, 650, 8, 2, (11, 10, 1), 0.01, 1e-3, decay=0.6, focus=SLOWEST, easy_vqa=5),
    CurriculumStage("sum", CANVAS, COUNTS, 220, 8, 2, (20, 5, 1), 6e-3, 6e-4, decay=0.9, focus=("count",), easy_vqa=5),
)
