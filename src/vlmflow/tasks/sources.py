"""Where samples come from: data files and hub data sets, read as records that know where they stand."""

from __future__ import annotations

import base64
import binascii
import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

from vlmflow.core.errors import one_line, typed_line
from vlmflow.core.hub import HubError, UnreachableError, ask
from vlmflow.records.files import parse_json, read_text
from vlmflow.tasks.sample import LETTERS, Picture, Sample, TaskError


@dataclass(frozen=True)
class Source:
    """Where samples come from: a local copy if ``path`` is given, else the hub.

    ``images`` is the folder of a local copy's images where they do not lie beside it. ``hub`` is the id or folder of
    another data set than the task's with the same columns, and ``config`` its configuration. ``split`` and
    ``revision`` replace the task's own.
    """

    path: Path | None = None
    images: Path | None = None
    hub: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Hub:
    """A data set on the hub, and the part of it that is the benchmark; ``former`` is the id that it had before."""

    id: str
    split: str
    config: str | None = None
    former: str | None = None

    def resolve(self, source: Source) -> Hub:
        """The data set that a source means."""
        split = source.split or self.split
        if source.hub is None:
            return Hub(self.id, split, source.config or self.config, self.former)
        config = self.config if source.hub in (self.id, self.former) else None
        return Hub(source.hub, split, source.config or config)


@dataclass(frozen=True)
class Record:
    """One record and its place, so that an error can name both; ``picture`` where the record itself holds one.

    ``commit`` is the hub's of the data set.
    """

    origin: str
    fields: Mapping[str, Any]
    picture: Picture | None = None
    commit: str | None = None

    def text(self, name: str, default: str | None = None) -> str:
        """A text or number as text; ``default`` where it is missing or null."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise TaskError(f"{self.origin}: {name!r} must be text, got {value!r:.80}")
        return str(value)

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts; one text is a list of one."""
        value = self._value(name, None)
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, Sequence) or not listed or not all(isinstance(t, str) for t in listed):
            raise TaskError(f"{self.origin}: {name!r} must be a list of texts, got {value!r:.80}")
        return tuple(listed)

    def choices(self) -> tuple[str, ...]:
        """The list of texts ``choices``, each of which goes by a letter."""
        choices = self.texts("choices")
        if len(choices) > len(LETTERS):
            raise TaskError(
                f"{self.origin}: 'choices' may be at most {len(LETTERS)}, as each goes by a letter, got {len(choices)}"
            )
        return choices

    def number(self, name: str) -> int:
        """A whole number."""
        value = self._value(name, None)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TaskError(f"{self.origin}: {name!r} must be a whole number, got {value!r:.80}")
        return value

    def choices_and_answer(self, name: str) -> tuple[tuple[str, ...], str]:
        """The choices, and the letter of the right one, whose index is the field ``name``."""
        choices, index = self.choices(), self.number(name)
        if not 0 <= index < len(choices):
            raise TaskError(f"{self.origin}: {name!r} is {index}, but there are {len(choices)} choices")
        return choices, LETTERS[index]

    def rows(self, name: str) -> list[Record]:
        """A list of records inside this one."""
        value = self._value(name, None)
        if not isinstance(value, list) or not all(isinstance(fields, dict) for fields in value):
            raise TaskError(f"{self.origin}: {name!r} must be a list of objects, got {value!r:.80}")
        return [Record(f"{self.origin}, {name}[{i}]", fields) for i, fields in enumerate(value)]

    def sample(self, key: str, **fields: Any) -> Sample:
        """The record as a sample about the image that it holds."""
        if self.picture is None:
            raise TaskError(f"{self.origin}: no image")
        return Sample(key, (self.picture,), origin=self.origin, commit=self.commit, **fields)

    def with_image(self, folders: Sequence[Path], name: str) -> Record:
        """The record with an image file (see ``image_in``)."""
        return replace(self, picture=self.image_in(folders, name))

    def image_in(self, folders: Sequence[Path], name: str) -> Picture:
        """The image file of a name, in the first of the folders that has it."""
        for folder in folders:
            if (folder / name).is_file():
                return Picture(name, folder / name)
        listed = ", ".join(str(folder) for folder in folders)
        raise TaskError(f"{self.origin}: image {name} not found in {listed}")

    def _value(self, name: str, default: object) -> Any:
        value = self.fields.get(name)
        if value is None and default is None:
            state = "is null" if name in self.fields else f"is missing (there are: {', '.join(self.fields)})"
            raise TaskError(f"{self.origin}: {name!r} {state}")
        return default if value is None else value


def existing(path: Path) -> Path:
    """The path, or a ``TaskError`` where nothing is there."""
    if not path.exists():
        raise TaskError(f"{path}: no such file or folder")
    return path


def find_file(path: Path, *names: str) -> Path:
    """The path itself if it is a file, else the first of these names in that folder, or a ``TaskError``."""
    if existing(path).is_file():
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    raise TaskError(f"{path}: holds none of {', '.join(names)}")


def read_table(path: Path) -> Iterator[Record]:
    """The records of a JSON file that is an object of objects; their keys become the field ``key``."""
    table = parse_json(read_text(path), path)
    if not isinstance(table, dict):
        raise TaskError(f"{path}: must be an object of objects by id, got a {type(table).__name__}")
    for key, fields in table.items():
        if not isinstance(fields, dict):
            raise TaskError(f"{path}, {key!r}: must be an object, got {fields!r:.80}")
        yield Record(f"{path}, {key!r}", {**fields, "key": key})


def read_list(path: Path) -> Iterator[Record]:
    """The records of a JSON file that is a list of objects."""
    yield from Record(str(path), {"list": parse_json(read_text(path), path)}).rows("list")


def read_lines(path: Path) -> Iterator[Record]:
    """The records of a file with one JSON object a line; empty lines do not count."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        origin = f"{path}, line {number}"
        fields = parse_json(line, path, number)
        if not isinstance(fields, dict):
            raise TaskError(f"{origin}: must be a JSON object, got {fields!r:.80}")
        yield Record(origin, fields)


def by_key(rows: Iterable[Record], name: str) -> dict[str, Record]:
    """Records by the text of a field that tells them apart, or a ``TaskError`` where it does not."""
    records: dict[str, Record] = {}
    for row in rows:
        first = records.setdefault(row.text(name), row)
        if first is not row:
            raise TaskError(f"{row.origin}: {name!r} {row.text(name)!r} is taken by {first.origin}")
    return records


def read_tsv(path: Path) -> Iterator[Record]:
    """The records of a VLMEvalKit TSV; empty cells are missing.

    ``image`` holds an image in base 64, or the ``index`` of the row that holds it, or a list of images written
    out, of which the first counts.
    """
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with existing(path).open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter="\t")
            header = next(lines, [])
            records = [(lines.line_num, line) for line in lines if line]
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: is not UTF-8 ({error.reason})") from None
    except csv.Error as error:
        raise TaskError(f"{path}: broken TSV ({error})") from None
    finally:
        csv.field_size_limit(limit)
    tables: list[tuple[str, dict[str, str]]] = []
    for number, line in records:
        if len(line) != len(header):
            raise TaskError(f"{path}, line {number}: {len(line)} cells for {len(header)} columns")
        fields = {name: cell for name, cell in zip(header, line, strict=True) if cell}
        tables.append((f"{path}, line {number}", fields))
    images = {fields["index"]: fields["image"] for _, fields in tables if {"index", "image"} <= fields.keys()}
    decoded: dict[str, bytes] = {}
    for origin, fields in tables:
        key = fields.get("index", "")
        if images.get(key, "") in images:
            key = images[key]
        if key in images and key not in decoded:
            decoded[key] = _from_base64(images[key], origin)
        picture = Picture(f"{path.name}:{key}", decoded[key]) if key in decoded else None
        yield Record(origin, {name: cell for name, cell in fields.items() if name != "image"}, picture)


def tsv_choices_and_answer(row: Record) -> tuple[tuple[str, ...], str]:
    """The choices of a VLMEvalKit row, its columns A, B, C and so on until one is empty, and the right one's letter."""
    choices = tuple(map(row.text, takewhile(row.fields.__contains__, LETTERS)))
    if not choices:
        raise TaskError(f"{row.origin}: no option columns 'A', 'B' ... (there are: {', '.join(row.fields)})")
    letter = row.text("answer").strip().upper()
    if letter not in [*LETTERS[: len(choices)]]:
        raise TaskError(f"{row.origin}: 'answer' is {letter!r}, but there are {len(choices)} choices")
    return choices, letter


def read_hub(hub: Hub, source: Source, image_name: str | None = None) -> Iterator[Record]:
    """The records of a data set on the hub, without their images, which are opened when needed.

    ``image_name`` is the column that tells images apart; without it no two rows share one.

    Raises:
        TaskError: the extra is not installed, or the data set cannot be had.
    """
    try:
        import datasets
    except ImportError:
        raise TaskError('hub data sets need the "datasets" package: pip install "vlmflow[eval]"') from None
    hub = hub.resolve(source)
    name = f"{hub.id} ({hub.config or 'default'}, {hub.split})"
    try:
        table = _load(datasets, hub, source.revision)
    except Exception as error:  # the hub client raises what it likes: network, id, configuration, file format
        reason = one_line(error) if isinstance(error, HubError) else typed_line(error)
        raise TaskError(f"{name}: cannot be loaded ({reason}); without a network, give a local copy") from error
    if not isinstance(table, datasets.Dataset):
        raise TaskError(f"{name}: split must name one split")
    if "image" not in table.column_names:
        raise TaskError(f"{name}: column 'image' is missing (there are: {', '.join(table.column_names)})")
    commit = _commit(table)
    images = table.cast_column("image", datasets.Image(decode=False)).select_columns("image")
    records = cast(Iterable[dict[str, Any]], table.remove_columns("image"))
    for number, fields in enumerate(records):
        picture = None
        if images.data.column("image")[number].is_valid:
            picture = Picture(str(fields.get(image_name or "", f"row {number}")), partial(_hub_image, images, number))
        yield Record(f"{name}, row {number}", {**fields, "row": number}, picture, commit)


def _load(datasets: Any, hub: Hub, revision: str | None) -> Any:
    """The data set by its id, else by its former one: what the hub has, or without a network, what was downloaded."""
    load = partial(datasets.load_dataset, name=hub.config, split=hub.split, revision=revision)
    with _offline_unless_reached(datasets, hub.id, revision):
        try:
            return load(hub.id)
        except (FileNotFoundError, ConnectionError):
            if hub.former is None:
                raise
            return load(hub.former)


@contextmanager
def _offline_unless_reached(datasets: Any, name: str, revision: str | None) -> Iterator[None]:
    """Keep datasets from asking for minutes a hub that does not answer; what was not downloaded then fails for that."""
    before, silent = datasets.config.HF_HUB_OFFLINE, None
    if not before and not Path(name).is_dir():
        try:
            ask("dataset", name, revision)
        except UnreachableError as error:
            datasets.config.HF_HUB_OFFLINE, silent = True, error
        except HubError:
            pass  # it may have moved
    try:
        yield
    except ConnectionError:
        if silent is None:
            raise
        raise silent from None
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _commit(table: Any) -> str | None:
    """The hub's commit that a data set's files are of; None for a folder's."""
    files = " ".join(table.info.download_checksums or ())
    found = re.search(r"hf://datasets/[^@ ]+@([0-9a-f]{40})/", files)
    return found and found[1]


def _hub_image(images: Any, number: int) -> Path | bytes:
    held = images[number]["image"]
    return Path(held["path"]) if held["bytes"] is None else held["bytes"]


def _from_base64(text: str, origin: str) -> bytes:
    """An image; of a list of images written out the first."""
    first = text.strip("[]'\" ").split(",")[0].strip("'\" ")
    try:
        return base64.b64decode(first, validate=True)
    except binascii.Error:
        raise TaskError(f"{origin}: 'image' is not base 64") from None
