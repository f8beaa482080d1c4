"""What the commands write, as types: one dataclass a record, read back by the same class.

``FORMAT`` counts changes that an older reader cannot take; records made before it was written have none and are read
as the first. The JSON Schema of all records stands in ``docs/schema.json`` (``python -m docs.make.schema``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, PlainSerializer, TypeAdapter, ValidationError, WithJsonSchema
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from vlmflow.core.cost import Cost, Figures
from vlmflow.core.grids import Tile
from vlmflow.core.statistics import Interval
from vlmflow.records.files import RecordError, read_json

FORMAT = 1
T = TypeVar("T")

Versions = dict[str, str]
PrunerFields = dict[str, Any]  # the method's name and its fields
Grid = tuple[int, int]  # rows and columns of image tokens
Size = tuple[int, int]  # width and height in pixels
Judgement = Literal["holds", "does not hold", "undecided"]
Number = float | str | None  # null for nan, a text for an infinity: as Interval.to_dict writes them
Estimate = Annotated[
    Interval,
    BeforeValidator(lambda v: {k: math.nan if n is None else n for k, n in v.items()} if isinstance(v, Mapping) else v),
    PlainSerializer(Interval.to_dict),
    WithJsonSchema(TypeAdapter(dict[str, Number]).json_schema()),
]


@dataclass(frozen=True)
class CostRecord:
    """What pruned prefills cost beside unpruned ones (``vlmflow.core.cost.Cost``), with the shares by measure."""

    pruned: Figures
    unpruned: Figures
    attention: str
    dtype_bytes: int
    samples: int
    vision_flops: int
    projector_flops: int
    shares: dict[str, float]

    @classmethod
    def of(cls, cost: Cost) -> CostRecord:
        """A cost as it is written."""
        return cls(**vars(cost), shares={measure: share for measure, (_, _, share) in cost.table().items()})


@dataclass(frozen=True)
class AnswerRecord:
    """What a model said, and in how many tokens."""

    text: str
    tokens: int


@dataclass(frozen=True)
class MethodRun:
    """One question under one method.

    ``image_tokens`` entered each layer; ``stages`` maps a layer to the numbers, among the prompt's image tokens, of
    those that stayed from there on.
    """

    pruner: PrunerFields
    answer: AnswerRecord
    image_tokens: list[int]
    stages: dict[str, list[int]]
    cost: CostRecord


@dataclass(frozen=True)
class SeenImages:
    """How a prompt's images became tokens.

    ``positions`` are the image tokens' places in the prompt, ``sizes`` the images as they were given; ``grids`` has the
    rows and columns of each image's tokens, None where they are not one grid an image. ``tiles`` has every grid, those
    of images that a model sees in parts too, None where that cannot be told.
    """

    sizes: list[Size]
    positions: list[int]
    grids: list[Grid] | None
    tiles: list[Tile] | None = None


@dataclass(frozen=True)
class RunRecord:
    """``vlmflow run``: one question under some methods."""

    model: str
    prompt: str
    images: list[str]
    versions: Versions
    runs: dict[str, MethodRun]
    seen: SeenImages | None = None
    commit: str | None = None  # the hub's, of the model
    format: int = FORMAT


@dataclass(frozen=True)
class DemoRecord:
    """``vlmflow demo``: how many of ``asked`` questions each method answered right, and its run of the first one."""

    versions: Versions
    asked: int
    right: dict[str, int]
    runs: dict[str, MethodRun]
    seen: SeenImages | None = None
    format: int = FORMAT


@dataclass(frozen=True)
class FlowRecord:
    """``vlmflow flow show``: the flow from each image token, in some layers of one prompt.

    ``token`` is the model's next one, whose prediction is looked at; ``importance`` sums each flow over image tokens,
    layer by layer, and ``maps`` has it for each image token: (layer, image token).
    """

    model: str
    prompt: str
    images: list[str]
    token: str
    layers: list[int]
    importance: dict[str, list[float]]
    versions: Versions
    seen: SeenImages | None = None
    maps: dict[str, list[list[float]]] = field(default_factory=dict)
    commit: str | None = None  # the hub's, of the model
    format: int = FORMAT


@dataclass(frozen=True)
class PriceRecord:
    """``vlmflow cost``: a method's cost on a model, from its widths alone; ``schedule`` image tokens enter a layer."""

    model: str
    pruner: PrunerFields
    image_tokens: int
    text_tokens: int
    schedule: list[int]
    cost: CostRecord
    vision_flops: int | None = None
    projector_flops: int | None = None
    commit: str | None = None  # the hub's, of the model's config
    format: int = FORMAT


@dataclass(frozen=True)
class LatencyRecord:
    """One method on one request, by part of a run: median seconds, and how many times as fast as unpruned.

    ``promised`` is the prefill's speed-up if time were exact FLOPs, None for a model whose widths are not known.
    ``peak_bytes`` is the most memory held above what was held before, None where the platform does not tell,
    ``kv_bytes`` what the KV cache holds at the end.
    """

    pruner: PrunerFields
    seconds: dict[str, float]
    speedup: dict[str, Interval]
    promised: float | None
    peak_bytes: int | None
    kv_bytes: int


@dataclass(frozen=True)
class BenchPoint:
    """Methods on one request, the unpruned run first: a batch of prompts with each one's image and text tokens."""

    batch: int
    new_tokens: int
    image_tokens: list[int]
    text_tokens: list[int]
    methods: dict[str, LatencyRecord]

    @property
    def not_paying(self) -> dict[str, Interval]:
        """The methods that no run shows to be faster end to end, with the speed-up that was seen."""
        totals = {name: latency.speedup["total"] for name, latency in self.methods.items() if name != "none"}
        return {name: ratio for name, ratio in totals.items() if ratio.low <= 1}


@dataclass(frozen=True)
class BenchRecord:
    """``vlmflow bench``: seconds and bytes, measured side by side on one machine."""

    subject: str
    layers: int
    shared_weights: bool
    protocol: str
    dtype: str
    repeats: int
    machine: dict[str, Any]
    versions: Versions
    points: list[BenchPoint]
    commit: str | None = None  # the hub's, of the model
    questions: dict[str, str] = field(default_factory=dict)  # where they came from, with the hub's commit
    format: int = FORMAT


@dataclass(frozen=True)
class Line:
    """One run as a line of a long table; None where there is nothing to say.

    Costs are means over samples, shares and FLOPs those of the prefill by both conventions; ``difference`` is the
    figure minus the unpruned run's, and ``images`` those that the figure's interval is over.
    """

    model: str
    task: str
    method: str
    fields: str
    budget: float | None
    folder: str
    figure: str | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p: float | None = None
    mean_image_tokens: float | None = None
    mean_image_tokens_share: float | None = None
    eq10_flops: float | None = None
    eq10_share: float | None = None
    exact_flops: float | None = None
    exact_share: float | None = None
    kv_share: float | None = None
    samples: int = 0
    failed: int = 0
    unparsed: int = 0
    excluded: int = 0
    note: str = ""
    images: int | None = None


@dataclass(frozen=True)
class SweepRecord:
    """``vlmflow sweep``: every method at every budget; ``settings`` are those that the runs share."""

    settings: dict[str, Any]
    lines: list[Line]
    format: int = FORMAT


@dataclass(frozen=True)
class ReportRecord:
    """``vlmflow report``: finished runs, one a line, and what must be said of them."""

    lines: list[Line]
    notes: list[str]
    format: int = FORMAT


@dataclass(frozen=True)
class EvaluationCounts:
    """Samples of an evaluation."""

    asked: int
    answered: int
    failed: int


class SummedCost(TypedDict):
    """``CostRecord`` of all prefills, and by measure the unpruned figure, the pruned one, and its share."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]
    table: dict[str, tuple[float, float, float]]
    samples: int
    shares: dict[str, float]


@dataclass(frozen=True)
class EvaluationSummary:
    """``vlmflow eval``: a method on a task. ``metric`` is the task's own figure, None where nothing was answered.

    ``image_tokens`` entered each layer, in the mean over samples, as ``tokens`` and ``answer_tokens`` are means;
    ``cost`` sums the prefills, None for a model whose widths are not known.
    """

    settings: dict[str, Any]
    metric: dict[str, Any] | None
    judge: dict[str, Any] | None
    samples: EvaluationCounts
    failed: dict[str, str]
    answer_tokens: float | None
    tokens: float | None
    image_tokens: list[float]
    cost: SummedCost | None
    format: int = FORMAT


@dataclass(frozen=True)
class StudyRow:
    """One sample's line in the ``rows.jsonl`` of a study of the flow.

    ``blank_answer`` is what the model said to a blank picture; where that was right, the sample is ``dropped`` and
    nothing else is known of it. ``target`` is the answer's first token, ``right`` whether it was the likeliest one
    with the image, ``lengths`` the tokens of each segment, ``found`` the experiment's numbers. ``failure`` says
    why there is nothing.
    """

    id: str
    images: tuple[str, ...]
    blank_answer: str = ""
    dropped: bool = False
    target: int = -1
    right: bool = False
    lengths: dict[str, int] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None

    @property
    def kept(self) -> bool:
        """Whether it counts."""
        return not self.dropped and self.failure is None

    def to_dict(self) -> dict[str, Any]:
        """The row in JSON's own types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> StudyRow:
        """The row that ``to_dict`` wrote."""
        return from_json(cls, record, "a row")


@dataclass(frozen=True)
class Claim:
    """That a number is above 0, the number with its interval, and whether that says so."""

    claim: str
    judgement: Judgement
    value: Number
    low: Number
    high: Number
    undefined: Number

    @property
    def number(self) -> Interval:
        """The number with its interval."""
        return Interval.from_dict(vars(self))


@dataclass(frozen=True)
class Hypothesis:
    """One of the paper's hypotheses, judged by its claims."""

    judgement: Judgement
    claims: list[Claim]


@dataclass(frozen=True)
class StudyCounts:
    """Samples of a study, and the different images of those that were kept."""

    asked: int
    dropped: int
    failed: int
    kept: int
    images: int


@dataclass(frozen=True, kw_only=True)
class StudySummary:
    """What all studies of the flow sum up alike; each adds fields of its own.

    ``right`` is the share of kept samples whose answer's first token was the likeliest one, ``lengths`` has the tokens
    of each segment, sample by sample.
    """

    settings: dict[str, Any]
    samples: StudyCounts
    failed: dict[str, str]
    right: Estimate
    lengths: dict[str, list[int]]
    hypotheses: dict[str, Hypothesis]
    format: int = FORMAT


RECORDS = (
    *(RunRecord, DemoRecord, FlowRecord, PriceRecord, BenchRecord, SweepRecord, ReportRecord),
    *(EvaluationSummary, StudyRow),
)


def to_json(record: Any) -> dict[str, Any]:
    """A record in JSON's own types, field by field."""
    return TypeAdapter(type(record)).dump_python(record, mode="json")


_adapter = cache(TypeAdapter)  # which takes longer to make than to use


def from_json(kind: type[T], record: Mapping[str, Any], origin: object) -> T:
    """A record that ``to_json`` made; fields that are not known are left out. ``origin`` is its place, for errors.

    Raises:
        RecordError: a field is missing or of another type, or a newer version has written it.
    """
    written = record.get("format", FORMAT)
    if isinstance(written, int) and written > FORMAT:
        raise RecordError(f"{origin}: written in format {written} by a newer vlmflow; this one reads {FORMAT}")
    try:
        return _adapter(kind).validate_python(record)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise RecordError(f"{origin}: {place} of a {kind.__name__} is wrong ({first['msg']})") from None


def read_record(kind: type[T], path: Path) -> T:
    """A record from its file.

    Raises:
        RecordError: there is none, it is broken, or no record of this kind.
    """
    return from_json(kind, read_json(path), path)


def json_schema(kinds: Iterable[type[Any]] = RECORDS) -> dict[str, Any]:
    """The JSON Schema of records, by name."""
    return {kind.__name__: TypeAdapter(kind).json_schema() for kind in kinds}
