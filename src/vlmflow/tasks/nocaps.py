"""NoCaps, validation: captions of 4,500 Open Images pictures, many of things that COCO captions do not name.

Source: NoCaps (ICCV 2019). Table 2 of the paper.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlmflow.records.files import read_json
from vlmflow.tasks.cider import cider
from vlmflow.tasks.core import open_task
from vlmflow.tasks.prompts import caption
from vlmflow.tasks.sample import Sample, TaskError
from vlmflow.tasks.sources import Hub, Record, Source, find_file, read_hub

HUB = Hub("lmms-lab-encoder/NoCaps", split="validation", former="lmms-lab/NoCaps")


def load(source: Source) -> Iterator[Sample]:
    """The hub, or nocaps_val_4500_captions.json with its images in ``images``, or else beside it.

    The local copy knows the domain (in, near, out), which becomes the group; the hub's copy does not.
    """
    if source.path is None:
        yield from map(from_hub, read_hub(HUB, source, image_name="image_file_name"))
        return
    path = find_file(source.path, "nocaps_val_4500_captions.json")
    file = Record(str(path), read_json(path))
    captions: dict[str, list[str]] = {}
    for row in file.rows("annotations"):
        captions.setdefault(row.text("image_id"), []).append(row.text("caption"))
    above = source.images or path.parent
    for row in file.rows("images"):
        key = row.text("id")
        if key not in captions:
            raise TaskError(f"{row.origin}: image {key} has no captions")
        pictured = row.with_image([above, above / "val"], row.text("file_name"))
        yield pictured.sample(key, references=tuple(captions[key]), group=row.text("domain", ""))


def from_hub(row: Record) -> Sample:
    """A row of the hub's data set."""
    return row.sample(row.text("image_id"), references=row.texts("annotations_captions"))


NOCAPS = open_task(
    name="nocaps",
    title="NoCaps (validation)",
    load=load,
    prompts={"paper": caption},
    measure=cider,
    max_new_tokens=64,
    hub=HUB,
)
