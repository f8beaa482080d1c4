"""The benchmarks: the paper's seven, two that need no download, and your own questions.

Each stands whole in its file: where its samples come from, its prompts, its answer rules, its figure.
"""

from vlmflow.tasks.aokvqa import AOKVQA
from vlmflow.tasks.core import Metric, Outcome, Rubric, Task
from vlmflow.tasks.easy_vqa import EASY_VQA
from vlmflow.tasks.flickr30k import FLICKR30K
from vlmflow.tasks.jsonl import JSONL
from vlmflow.tasks.llava_bench import LLAVA_BENCH
from vlmflow.tasks.mmvet import MMVET
from vlmflow.tasks.nocaps import NOCAPS
from vlmflow.tasks.pico import PICO, PICO_CAPTIONS
from vlmflow.tasks.pope import POPE
from vlmflow.tasks.sample import Picture, Sample, TaskError
from vlmflow.tasks.scienceqa import SCIENCEQA
from vlmflow.tasks.sources import Hub, Source

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        SCIENCEQA, AOKVQA, POPE, NOCAPS, FLICKR30K, LLAVA_BENCH, MMVET, EASY_VQA, PICO, PICO_CAPTIONS, JSONL,
    )
}  # fmt: skip

__all__ = ["TASKS", "Hub", "Metric", "Outcome", "Picture", "Rubric", "Sample", "Source", "Task", "TaskError"]
