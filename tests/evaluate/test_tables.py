"""Tables read back by the values put in: signs, order, marks, units, heads. Rows and summaries are made by hand."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

import oracles
from vlmflow.evaluate.rows import Row, rows_of
from vlmflow.evaluate.tables import Result, budget_grid, find_results, group_grid, line_of, report, table_of
from vlmflow.records.files import RecordError
from vlmflow.records.folder import Folder
from vlmflow.records.schema import EvaluationCounts, EvaluationSummary, Line
from vlmflow.records.table import Table
from vlmflow.tasks import Picture, Sample

IMAGES = [0, 0, 0, 1, 2, 2, 3, 4]  # of the questions: unequal clusters
BARE = [1, 1, 0, 1, 1, 0, 1, 0]
PRUNED = [0, 1, 0, 0, 1, 1, 0, 0]
# sums over four samples, unpruned and pruned, but the mean of image tokens in a layer; then pruned over unpruned
COSTS = {
    "mean_image_tokens": (576.0, 144.25, 0.25),
    "paper_flops": (8e12, 2e12, 0.25),
    "exact_flops": (16e12, 8e12, 0.5),
    "decode_flops": (4e9, 3e9, 0.75),
    "kv_bytes": (4e8, 1e8, 0.375),
}


def finished(
    path: Path,
    scores: list[int],
    method: str = "himap",
    *,
    model: str = "llava",
    task: str = "pico",
    value: float | None = 50.0,
    interval: tuple[float, float] | None = (25.0, 75.0),
    costs: dict | None = COSTS,
    counts: tuple[int, int, int] = (8, 8, 0),
    groups: str = "",
    **settings,
) -> Result:
    """A run's folder with a row a score, and a summary that says what it is told to."""
    rows = [
        Row(
            Sample(
                f"q{number}",
                (Picture(f"{IMAGES[number % 8]}.png", b""),),
                answer="yes",
                group=groups[number : number + 1],
            ),
            "",
            "yes" if score else "no",
            "yes" if score else "no",
            float(score),
        )
        for number, score in enumerate(scores)
    ]
    path.mkdir(parents=True)
    rows_of(Folder(path)).append(rows)
    cost = costs and {
        "table": {name: list(figures) for name, figures in costs.items()},
        "shares": {name: share for name, (_, _, share) in costs.items()},
        "samples": 4,
    }
    summary = EvaluationSummary(
        settings={"model": model, "task": task, "seed": 3, "pruner": {"name": method}} | settings,
        metric=None if value is None else {"figure": "accuracy", "value": value, "interval": interval, "unparsed": 2},
        judge=None,
        samples=EvaluationCounts(*counts),
        failed={},
        answer_tokens=1.0,
        tokens=700.0,
        image_tokens=[],
        cost=cost,
    )
    return Result(path, summary)


@pytest.fixture
def pair(tmp_path):
    return finished(tmp_path / "none", BARE, "none", value=62.5), finished(tmp_path / "himap", PRUNED, k1=2, r1=0.5)


def test_a_line_holds_the_pruned_runs_figures(pair):
    """FLOPs are means over samples, of the pruned prefills; shares are pruned over unpruned."""
    line = line_of(pair[1], budget=0.25)
    assert (line.model, line.task, line.method, line.budget) == ("llava", "pico", "himap", 0.25)
    assert (line.figure, line.value, line.low, line.high) == ("accuracy", 50.0, 25.0, 75.0)
    assert (line.mean_image_tokens, line.mean_image_tokens_share) == (144.25, 0.25)
    assert (line.eq10_flops, line.eq10_share) == (2e12 / 4, 0.25)
    assert (line.exact_flops, line.exact_share) == (8e12 / 4, 0.5)
    assert (line.kv_share, line.samples, line.failed, line.unparsed, line.excluded) == (0.375, 8, 0, 2, 0)
    assert (line.difference, line.difference_low, line.difference_high, line.p, line.note) == (None,) * 4 + ("",)
    assert pair[1].cost("paper_flops", pruned=False) == 8e12 / 4


def test_a_difference_is_the_method_less_the_unpruned_run(pair):
    """What is lost is negative; its interval is the paired bootstrap's over images, p McNemar's of the questions."""
    line = line_of(pair[1], pair[0])
    rows = list(zip(BARE, PRUNED, strict=True))

    def lost(rows):
        return 100 * (oracles.mean([after for _, after in rows]) - oracles.mean([before for before, _ in rows]))

    low, high, _ = oracles.middle_95([lost(drawn) for drawn in oracles.resamples(rows, IMAGES, seed=3)])
    assert line.difference == lost(rows) == -25.0
    assert (line.difference_low, line.difference_high) == pytest.approx((low, high))
    only_before, only_after = rows.count((1, 0)), rows.count((0, 1))
    tail = sum(math.comb(only_before + only_after, k) for k in range(min(only_before, only_after) + 1))
    assert line.p == pytest.approx(2 * tail / 2 ** (only_before + only_after))


def test_scores_between_right_and_wrong_are_told_apart_by_the_bootstrap(tmp_path):
    before, after = [1, 0.5, 0, 1, 0.5, 0, 1, 1], [0.5, 0.5, 0, 1, 1, 0, 0.5, 1]
    bare, pruned = finished(tmp_path / "a", before, "none"), finished(tmp_path / "b", after)
    rows = list(zip(before, after, strict=True))
    found = [oracles.mean([b - a for a, b in drawn]) for drawn in oracles.resamples(rows, IMAGES, seed=3)]
    assert line_of(pruned, bare).p == pytest.approx(oracles.two_sided_p(found))


def test_only_samples_that_both_have_answered_are_compared(tmp_path):
    bare, pruned = finished(tmp_path / "a", [*BARE, 1, 1], "none"), finished(tmp_path / "b", PRUNED)
    assert line_of(pruned, bare).difference == -25.0
    assert line_of(finished(tmp_path / "c", []), bare).difference is None


def test_runs_of_other_settings_are_not_compared(tmp_path):
    bare = finished(tmp_path / "a", BARE, "none", dtype="float32")
    line = line_of(finished(tmp_path / "b", PRUNED, dtype="bfloat16"), bare)
    assert line.note == 'not compared with the unpruned run: dtype was "float32", is "bfloat16"'
    assert line.difference is None
    assert line_of(bare, bare).difference is None


LINES = [
    Line("llava", "pico", "none", "", None, "a", "accuracy", 62.5, 50.0, 75.0, mean_image_tokens=576.0,
         mean_image_tokens_share=1.0, eq10_share=1.0, exact_share=1.0, kv_share=1.0),
    Line("llava", "pico", "himap", "k1=2 r1=0.5", 0.25, "b", "accuracy", 60.0, 45.5, 72.25, -2.5, -4.04, 1.96, 0.034,
         144.26, 0.2504, 3e12, 0.2012, 5e12, 0.4567, 0.375, samples=8, failed=1, unparsed=2, excluded=3),
    Line("llava", "pico", "vtw", "k=3", 0.1, "c", note="vtw cannot"),
]  # fmt: skip


def test_a_table_of_budgets():
    grid = budget_grid(LINES, "Scenes")
    assert grid.title == "Scenes: every method at every budget"
    assert grid.header == [
        *("method", "budget", "accuracy", "Δ", "p", "a layer", "of all", "Eq. 10", "exact", "KV", "fields", "of them")
    ]
    none, himap, refused = grid.rows
    assert none == [
        *("none", "-", "62.5 [50.0, 75.0]", "-", "-", "576.0", "100.0%", "100.0%", "100.0%", "100.0%", "", "")
    ]
    assert himap == [
        *("himap", "25%", "60.0 [45.5, 72.2]", "-2.5 [-4.0, +2.0]", "0.034", "144.3", "25.0%", "20.1%", "45.7%"),
        *("37.5%", "k1=2 r1=0.5", "1 failed, 2 unparsed, 3 unmarked"),
    ]
    assert refused == ["vtw", "10%", *["-"] * 8, "k=3", ""]
    narrow = budget_grid(LINES, "Scenes", wide=False)
    assert narrow.header == ["method", "budget", "accuracy", "Δ", "of all", "Eq. 10", "exact", "KV"]
    assert narrow.rows[1][3:] == ["-2.5 [-4.0, +2.0]", "25.0%", "20.1%", "45.7%", "37.5%"]
    assert budget_grid(LINES[2:], "").header[2] == "figure"


def test_a_table_of_lines_is_a_column_a_field():
    table = table_of(LINES[:2])
    assert table.header == list(Line.__dataclass_fields__)
    assert [dict(zip(table.header, row, strict=True)) for row in table.rows] == [vars(line) for line in LINES[:2]]


def test_a_table_of_parts_has_each_ones_interval_and_its_images(tmp_path):
    """A column a run, a part of the benchmark a row, in the order in which they come."""
    groups = "bbabaabb"
    runs = {name: finished(tmp_path / name, scores, groups=groups) for name, scores in (("x", BARE), ("y", PRUNED))}
    grid = group_grid(list(runs.items()), "Scenes: by part")
    assert (grid.header, grid.title) == (["", "images", "x", "y"], "Scenes: by part")
    assert [row[0] for row in grid.rows] == ["b", "a"]
    for part, count, *cells in grid.rows:
        for scores, cell in zip((BARE, PRUNED), cells, strict=True):
            rows = [(score, image) for score, image, group in zip(scores, IMAGES, groups, strict=True) if group == part]
            low, high = (100 * end for end in oracles.share_interval([(image, score) for score, image in rows]))
            value = 100 * oracles.mean([score for score, _ in rows])
            assert count == len({image for _, image in rows})
            assert cell == f"{value:.1f} [{low:.1f}, {high:.1f}]"
    assert group_grid([("x", finished(tmp_path / "z", BARE))], "") is None


def test_a_table_as_markdown_and_as_csv():
    table = Table(["method", "a|b", "p"], [["himap", "1|2", None], ["none", 3, 0.5]], "Title")
    body = "| method | a\\|b | p |\n| --- | --- | --- |\n| himap | 1\\|2 | None |\n| none | 3 | 0.5 |\n"
    assert table.markdown() == f"**Title**\n\n{body}"
    assert replace(table, title="").markdown(numbers=True) == body.replace(
        "| --- | --- | --- |", "| --- | ---: | ---: |"
    )
    assert table.csv() == "method,a|b,p\nhimap,1|2,\nnone,3,0.5\n"


def test_folders_that_hold_no_runs_are_refused_by_name(tmp_path):
    with pytest.raises(RecordError, match=rf"^{tmp_path}/gone: no such folder$"):
        find_results([tmp_path, tmp_path / "gone"][::-1])
    with pytest.raises(RecordError, match=rf"^{tmp_path}: holds no results of vlmflow eval or sweep$"):
        find_results([tmp_path])


def costs(eq10: float, share: float, exact: float, unpruned: float = 8e12) -> dict:
    """Of four samples, as ``COSTS``."""
    return COSTS | {"paper_flops": (unpruned, eq10, share), "exact_flops": (16e12, 16e12 * exact, exact)}


WHOLE = costs(8e12, 1.0, 1.0)


def written(tmp_path, scale: float = 1.0) -> list[Result]:
    """Two models, two tasks of Table 1 and one of Table 2; the unpruned runs neither first nor best."""
    small = {name: (a * scale, b * scale, share) for name, (a, b, share) in costs(2e12, 0.25, 0.4).items()}
    other = {name: (a * scale, b * scale, share) for name, (a, b, share) in costs(4e12, 0.5, 0.3).items()}
    whole = {name: (a * scale, b * scale, share) for name, (a, b, share) in WHOLE.items()}
    return [
        finished(tmp_path / "1", PRUNED, "himap", costs=small, value=50.0),
        finished(tmp_path / "2", BARE, "none", costs=whole, value=62.5),
        finished(tmp_path / "3", BARE, "vtw", costs=other, value=70.0, interval=None),
        finished(tmp_path / "4", PRUNED, "himap", task="pope", costs=other, value=91.0, counts=(9, 8, 1)),
        finished(tmp_path / "5", BARE, "none", task="pope", costs=whole, value=90.0),
        finished(tmp_path / "6", BARE, "none", model="qwen", costs=whole, value=99.0),
        finished(tmp_path / "7", BARE, "none", task="nocaps", costs=None, value=None),
    ]


def test_a_report_in_the_papers_form(tmp_path):
    """The unpruned run first; a model's best figure bold, its cheapest method in italics, by each way of counting."""
    scores, losses, captions = report(written(tmp_path)).grids
    assert scores.title == "Table 1: multiple choice, hallucination and short answers"
    assert scores.header == (
        *("model", "method", "TFLOPs (Eq. 10)", "ratio", "exact ratio", "pico (accuracy)", "pope (accuracy)"),
    )
    assert scores.rows == [
        ("llava", "none", "2.00", "100%", "100%", "62.5 [25.0, 75.0]", "90.0 [25.0, 75.0]"),
        ("llava", "himap", "_0.75_", "_38%_", "35%", "50.0 [25.0, 75.0]", "**91.0 [25.0, 75.0]**"),
        ("llava", "vtw", "1.00", "50%", "_30%_", "**70.0**", "-"),
        ("qwen", "none", "_2.00_", "_100%_", "_100%_", "**99.0 [25.0, 75.0]**", "-"),
    ]
    assert losses.title == f"{scores.title}: differences to the unpruned run"
    assert losses.header == ("model", "method", "pico", "pope")
    himap, vtw = losses.rows
    assert himap[:2] == ("llava", "himap")
    assert himap[2].startswith("-25.0 [-")
    assert himap[2].endswith(", p = 0.62")
    assert vtw == ("llava", "vtw", "+0.0 [+0.0, +0.0], p = 1", "-")
    assert captions.title == "Table 2: captions and open answers"
    assert captions.header[5:] == ("nocaps",)
    assert captions.rows == [("llava", "none", "-", "-", "-", "-")]


def test_a_report_says_what_its_marks_mean_and_what_is_missing(tmp_path):
    made = report(written(tmp_path))
    assert made.notes[0] == "**A model's best figure**, _its cheapest method_."
    assert made.notes[2] == f"{tmp_path / '4'}: 1 samples failed"
    assert f"{tmp_path / '1'}: 2 answers unparsed" in made.notes
    page = made.markdown()
    assert "| llava | himap | _0.75_ | _38%_ | 35% | 50.0 [25.0, 75.0] | **91.0 [25.0, 75.0]** |" in page
    assert page.endswith(f"- {made.notes[-1]}\n")


def test_small_models_costs_are_in_gflops(tmp_path):
    header, first = (lambda grid: (grid.header, grid.rows[0]))(report(written(tmp_path, scale=1e-3)).grids[0])
    assert (header[2], first[2]) == ("GFLOPs (Eq. 10)", "2.00")
    header, first = (lambda grid: (grid.header, grid.rows[0]))(report(written(tmp_path / "b", scale=0.05)).grids[0])
    assert (header[2], first[2]) == ("TFLOPs (Eq. 10)", "0.10")


def test_methods_of_one_name_are_told_apart_by_their_fields(tmp_path):
    def run(name, **fields):
        return finished(tmp_path / name, PRUNED, pruner={"name": "pyramiddrop", **fields})

    made = report([run("a", layers=[8, 16], ratio=0.5), run("b", layers=[2, 4], ratio=0.123456, seed=12345)])
    assert [row[1] for row in made.grids[0].rows] == [
        "pyramiddrop layers=8,16 ratio=0.5",
        "pyramiddrop layers=2,4 ratio=0.123 seed=12345",
    ]
    assert [row[1] for row in report([run("c", ratio=0.5)]).grids[0].rows] == ["pyramiddrop"]
