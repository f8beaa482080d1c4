"""Flickr30k: captions of photographs; all 31,783 on the hub, the usual 1,000 test images by Karpathy's list.

CIDEr weighs words by the set, so that the two give figures that do not compare. The hub's copy is what lmms-eval
measures, and by its prompt very likely the paper.

Source: Flickr30k (TACL 2014), split of Karpathy and Fei-Fei (CVPR 2015). Table 2 of the paper.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlmflow.records.files import read_json
from vlmflow.tasks.cider import cider
from vlmflow.tasks.core import open_task
from vlmflow.tasks.prompts import caption
from vlmflow.tasks.sample import Sample
from vlmflow.tasks.sources import Hub, Record, Source, find_file, read_hub

HUB = Hub("lmms-lab-encoder/flickr30k", split="test", former="lmms-lab/flickr30k")


def load(source: Source) -> Iterator[Sample]:
    """The hub, or Karpathy's dataset_flickr30k.json with its images in ``images``, or else beside it.

    ``split`` is Karpathy's (default test; "all" takes every image).
    """
    if source.path is None:
        yield from map(from_hub, read_hub(HUB, source, image_name="filename"))
        return
    path = find_file(source.path, "dataset_flickr30k.json")
    above, split = source.images or path.parent, source.split or "test"
    for row in Record(str(path), read_json(path)).rows("images"):
        if split in ("all", row.text("split")):
            folders = [above, above / "flickr30k-images", above / "flickr30k_images"]
            captions = tuple(sentence.text("raw") for sentence in row.rows("sentences"))
            yield row.with_image(folders, row.text("filename")).sample(row.text("imgid"), references=captions)


def from_hub(row: Record) -> Sample:
    """A row of the hub's data set."""
    return row.sample(row.text("img_id"), references=row.texts("caption"))


FLICKR30K = open_task(
    name="flickr30k",
    title="Flickr30k",
    load=load,
    prompts={"paper": caption},
    measure=cider,
    max_new_tokens=64,
    hub=HUB,
)
