"""Figures read back: what stands where, by the coordinates of the SVG and the pixels of the PNG, from values put in."""

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from vlmflow.core.grids import whole_tiles
from vlmflow.core.statistics import Interval
from vlmflow.figures import analysis, comparison, maps, style

SVG = "{http://www.w3.org/2000/svg}"
HREF = "{http://www.w3.org/1999/xlink}href"


class Drawing:
    """The marks of an SVG that matplotlib wrote."""

    def __init__(self, path: Path) -> None:
        self.text = path.read_text()
        root = ElementTree.fromstring(self.text)
        self.axes = [group for group in root.iter(f"{SVG}g") if group.get("id", "").startswith("axes_")]
        self.shapes = {path.get("id"): path.get("d") for path in root.iter(f"{SVG}path") if path.get("id")}
        self.words = re.findall(r"<!-- (.*?) -->", self.text)

    def marks(self, axes: int, name: str) -> list[list[tuple[float, float]]]:
        """Of each group in one of the axes that is called so: where it has marks, or the corners of its lines."""
        return [self._places(group) for group in self.axes[axes] if re.fullmatch(name, group.get("id", ""))]

    def _places(self, group: ElementTree.Element) -> list[tuple[float, float]]:
        uses = list(group.iter(f"{SVG}use"))
        if uses and group.get("id", "").startswith("FillBetween"):
            below = float(uses[0].get("y"))
            return [(x, y + below) for x, y in corners(self.shapes[uses[0].get(HREF)[1:]])]
        if uses:
            return [(float(use.get("x")), float(use.get("y"))) for use in uses]
        return [corner for path in group.iter(f"{SVG}path") for corner in corners(path.get("d", ""))]

    def colours(self, axes: int, name: str) -> list[set[str]]:
        """With what each of such groups is drawn."""
        groups = [group for group in self.axes[axes] if re.fullmatch(name, group.get("id", ""))]
        return [set(re.findall(r"stroke: (#\w+)", ElementTree.tostring(group, "unicode"))) for group in groups]

    def tips(self, axes: int, name: str) -> list[float]:
        """The height of the first corner of each marker's shape: a triangle's tip; above 0 is downwards."""
        groups = [group for group in self.axes[axes] if re.fullmatch(name, group.get("id", ""))]
        uses = [use for group in groups for use in group.iter(f"{SVG}use")]
        return [corners(self.shapes[use.get(HREF)[1:]])[0][1] for use in uses]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws into an SVG alone, and reads that."""
    save = style.save
    monkeypatch.setattr(style, "save", lambda figure, path: path.suffix == ".svg" and save(figure, path))

    def draw(draw, *given):
        draw(tmp_path / "a", *given)
        return Drawing(tmp_path / "a.svg")

    return draw


def corners(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)]


def ruler(places, values):
    """What turns places along an axis into values, from those of a curve that is known."""
    slope, offset = np.polyfit(places, values, 1)
    return lambda where: [slope * place + offset for place in where]


def intervals(*numbers) -> list[Interval]:
    return [Interval(*map(float, three)) for three in numbers]


def test_a_band_reaches_from_the_lower_to_the_upper_bound(drawn):
    """On a logarithmic scale, where zeros are left out."""
    one = intervals((10, 5, 40), (100, 50, 200), (20, 10, 80))
    two = intervals((1, 0.5, 8), (0, 0, 2), (4, 2, 5))
    drawn = drawn(analysis.by_layer, [3, 4, 7], {"one": one, "two": two}, "importance", "title")
    (line,), (other,) = drawn.marks(0, "one"), drawn.marks(0, "two")
    x = ruler([place[0] for place in line[:3]], [3, 4, 7])
    y = ruler([place[1] for place in line[:3]], np.log10([10, 100, 20]))
    band, _ = drawn.marks(0, "FillBetweenPolyCollection_.*")
    found = {(round(a), round(10**b, 3)) for (a, b) in zip(x(p[0] for p in band), y(p[1] for p in band), strict=True)}
    assert found == {(3, 5), (4, 50), (7, 10), (3, 40), (4, 200), (7, 80)}
    seen = list(zip(x(p[0] for p in other), (10**b for b in y(p[1] for p in other)), strict=True))
    assert [place for place, _ in seen] == pytest.approx([3, 7] * (len(seen) // 2), abs=1e-3)
    assert [value for _, value in seen][:2] == pytest.approx([1, 4], rel=1e-3)
    assert {"layer", "importance", "title", "one", "two"} <= {*drawn.words}


def test_points_stand_on_their_bars_side_by_side(drawn):
    left = {
        "this flow": intervals((0.5, 0.25, 0.75), (0.9, 0.8, 1.0)),
        "that flow": intervals((0.25, 0.0, 0.5), (0.6, 0.55, 0.7)),
    }
    drawn = drawn(analysis.consistencies, ["first", "last"], {"label": left, "score": left}, "title")
    for axes, measure in enumerate(("label", "score")):
        (this,), (that,) = drawn.marks(axes, f"{measure}: this flow"), drawn.marks(axes, f"{measure}: that flow")
        y = ruler([place[1] for place in this], [0.5, 0.9])
        assert y(place[1] for place in that) == pytest.approx([0.25, 0.6], abs=1e-4)
        for bars, points, curve in zip(
            drawn.marks(axes, "LineCollection_.*"), (this, that), left.values(), strict=True
        ):
            ends = [(interval.low, interval.high) for interval in curve]
            assert y(place[1] for place in bars) == pytest.approx([end for pair in ends for end in pair], abs=1e-4)
            assert [place[0] for place in bars[::2]] == pytest.approx([place[0] for place in points])
        apart = that[0][0] - this[0][0]
        assert apart / (this[1][0] - this[0][0]) == pytest.approx(0.24)
    assert drawn.words.count("first") == drawn.words.count("last") == 2
    assert {"label", "score", "blocked in", "consistency (95 % intervals)"} <= {*drawn.words}


def test_infinite_ratios_are_arrows_to_their_side(drawn):
    """At the panel's edge, a little beyond the largest finite bound; nothing stands where nothing is defined."""
    nan, inf = math.nan, math.inf
    ratio = intervals((1, 0.5, 1.5), (inf, -1, inf), (-inf, -inf, -0.5), (-2, -3, nan), (nan, nan, nan))
    lost = {"vt": intervals(*[(0.4, 0.2, 0.5), (0.8, 0.6, 0.9)] * 2, (0, 0, 0)), "vv": intervals(*[(0.1, 0, 0.2)] * 5)}
    drawn = drawn(analysis.log_ratios, list("abcde"), lost, ratio, "title")
    (points,) = drawn.marks(1, "D")
    y = ruler([place[1] for place in points], [1, -2])
    x = ruler([place[0] for place in points], [0, 3])
    edge = 1.15 * 3
    zero, up, down = (marks for marks in drawn.marks(1, r"line2d_\d+"))
    assert y(place[1] for place in zero) == pytest.approx([0, 0], abs=1e-3)
    ((right, top),), ((left, bottom),) = up, down
    assert (x([right])[0], y([top])[0]) == pytest.approx((1, edge), abs=1e-3)
    assert (x([left])[0], y([bottom])[0]) == pytest.approx((2, -edge), abs=1e-3)
    first, second = drawn.tips(1, r"line2d_\d+")
    assert first < 0 < second, "the first points up"
    (bars,) = drawn.marks(1, "LineCollection_.*")
    assert y(place[1] for place in bars) == pytest.approx([0.5, 1.5, -1, edge, -edge, -0.5], abs=1e-3)
    (vt,), (vv,) = drawn.marks(0, "vt"), drawn.marks(0, "vv")
    taken = ruler([place[1] for place in vt[:2]], [0.4, 0.8])
    assert taken(place[1] for place in vv) == pytest.approx([0.1] * 5, abs=1e-3)
    assert taken(place[1] for place in drawn.marks(0, "LineCollection_.*")[0][:4]) == pytest.approx(
        [0.2, 0.5, 0.6, 0.9], abs=1e-3
    )
    assert drawn.words.count("intra-visual flow matters more") == 1


def test_histograms_count_and_tell_the_median(drawn):
    drawn = drawn(analysis.lengths, {"image": [576] * 5, "text": [1, 2, 2, 2, 9, 9]}, "title")
    assert {"image: 576", "text: 1 to 9, median 2", "tokens", "samples"} <= {*drawn.words}
    bars = drawn.marks(1, "text")
    heights = [max(y for _, y in bar) - min(y for _, y in bar) for bar in bars]
    assert [round(height / max(heights) * 3) for height in heights] == [1, 3, 0, 0, 0, 0, 0, 0, 2]
    assert len(drawn.marks(0, "image")) == 1


POINTS = {
    "one": [comparison.Point(50, 60, 55, 70), comparison.Point(20, 50, 40, 52)],
    "two": [comparison.Point(50, 58, 50, 66), comparison.Point(30, 55, 54, 57)],
}


def test_a_figure_against_its_cost(tmp_path):
    """Each method's points by rising cost, with their bars; rings around what no other beats."""
    unpruned = comparison.Point(100, 65, 63, 67)
    comparison.pareto(tmp_path / "a.svg", {"Eq. 10": POINTS, "exact": POINTS}, unpruned, "accuracy", "title")
    drawn = Drawing(tmp_path / "a.svg")
    (first, _), (second, _) = (drawn.marks(axes, r"patch_\d+")[0][:2] for axes in (0, 1))
    assert first[1] == second[1], "side by side"
    *_, one, _, _, two, _ = drawn.colours(0, r"line2d_\d+")
    assert [one, two] == drawn.colours(0, "LineCollection_.*")
    assert one != two
    level, star, *_, one, _, _, two, rings = drawn.marks(0, r"line2d_\d+")
    x, y = ruler([place[0] for place in one], [20, 50]), ruler([place[1] for place in one], [50, 60])

    def values(places):
        return [tuple(pair) for pair in np.round(np.array([x(p[0] for p in places), y(p[1] for p in places)]).T, 2)]

    assert values(star) == [(100, 65)]
    assert {value for _, value in values(level)} == {65}
    assert values(two) == [(30, 55), (50, 58)]
    assert sorted(values(rings)) == [(20, 50), (30, 55), (50, 60), (100, 65)]
    bars = [values(places) for places in drawn.marks(0, "LineCollection_.*")]
    assert bars == [[(20, 40), (20, 52), (50, 55), (50, 70)], [(30, 54), (30, 57), (50, 50), (50, 66)]]
    span = drawn.marks(0, r"patch_\d+")[1]
    assert {value for _, value in values(span)} == {63, 67}
    assert {"Eq. 10", "exact", "accuracy (95 % intervals)", "unpruned", "not beaten", "one", "two"} <= {*drawn.words}


def test_measurements_stand_above_what_was_promised(tmp_path):
    kept = comparison.Promise("one", 2.0, Interval(1.5, 1.25, 1.75))
    broken = comparison.Promise("two", 4.0, Interval(1.0, 0.5, 1.1))
    comparison.promises(tmp_path / "a.svg", {"first token": [kept, broken]}, "title")
    drawn = Drawing(tmp_path / "a.svg")
    diagonal, one, two = drawn.marks(0, r"line2d_\d+")
    ends = [0.5 * 0.95, 4 * 1.05]
    x, y = ruler([place[0] for place in diagonal], ends), ruler([place[1] for place in diagonal], ends)
    assert (*x([one[0][0]]), *y([one[0][1]]), *x([two[0][0]]), *y([two[0][1]])) == pytest.approx(
        (2, 1.5, 4, 1), abs=1e-3
    )
    bars = [y(place[1] for place in bar) for bar in drawn.marks(0, "LineCollection_.*")]
    assert [value for bar in bars for value in bar] == pytest.approx([1.25, 1.75, 0.5, 1.1], abs=1e-3)
    assert {"first token: promised", "measured", "one", "two"} <= {*drawn.words}


# -- pictures of image tokens, by their pixels

RED, BLUE = (200, 0, 0), (0, 0, 200)
TILES = whole_tiles([(2, 3), (2, 2)])  # rows and columns: tokens 0 to 5, then 6 to 9
CENTRES = [  # of each token in the two pictures side by side, three and two columns wide
    *((row + 0.5, column + 0.5) for row in range(2) for column in range(3)),
    *((row + 0.5, column + 3.5) for row in range(2) for column in range(2)),
]


def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (90, 60), RED), Image.new("RGB", (60, 60), BLUE)]


def panels(path: Path, colours: set[tuple[int, ...]]) -> list[np.ndarray]:
    """The parts of a PNG that hold such colours, row by row, each from left to right."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    codes = [256 * (256 * r + g) + b for r, g, b in colours]
    ink = np.isin(pixels @ np.array([65536, 256, 1]), codes)
    found = []
    for top, bottom in runs(ink.sum(1) > 20):
        found += [pixels[top:bottom, left:right] for left, right in runs(ink[top:bottom].sum(0) > 20)]
    return found


def runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """Where each run of true flags begins and ends; gaps of a few pixels, as between two colours, are none."""
    places = np.flatnonzero(flags)
    cuts = np.flatnonzero(np.diff(places) > 6)
    return list(zip(places[[0, *cuts + 1]].tolist(), (places[[*cuts, -1]] + 1).tolist(), strict=True))


def tokens(panel: np.ndarray) -> list[tuple[int, ...]]:
    """The colour in the middle of each token."""
    height, width = panel.shape[:2]
    return [tuple(panel[int(row / 2 * height), int(column / 5 * width)].tolist()) for row, column in CENTRES]


def faded(colour):
    return tuple(int(part + (255 - part) * 0.82) for part in colour)


def test_kept_patches_keep_their_colour_and_dropped_ones_fade(tmp_path):
    """Tokens are numbered row by row, through all images."""
    whole = [RED] * 6 + [BLUE] * 4
    methods = {"himap": {2: [1, 3, 7], 8: [7]}}
    maps.kept_patches(tmp_path / "a.png", pictures(), TILES, methods, "title")
    seen, first, second = panels(tmp_path / "a.png", {RED, BLUE, faded(RED), faded(BLUE)})
    assert tokens(seen) == whole
    for panel, kept in ((first, {1, 3, 7}), (second, {7})):
        assert tokens(panel) == [c if n in kept else faded(c) for n, c in enumerate(whole)]


def test_each_map_has_its_own_scale_and_its_share(tmp_path):
    """Full colour for a layer's largest, grey for nothing; the share is that of the layer in its flow."""
    flows = {"into this": np.zeros((2, 10)), "into that": np.zeros((2, 10))}
    flows["into this"][0, [4, 6]] = 3, 1.5
    flows["into this"][1, 9] = 0.5
    maps.flow_maps(tmp_path / "a", pictures(), TILES, [5, 11], flows, "title")
    full, greys = np.array([158, 25.5, 0]), [int(np.array(c) @ [0.299, 0.587, 0.114]) / 2 + 127 for c in (RED, BLUE)]
    blank = [np.full(3, greys[n > 5]) for n in range(10)]
    one, two, none = [*blank], [*blank], blank
    one[4], one[6], two[9] = full, (full + greys[1]) / 2, full
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    colours = {tuple(colour) for colour in pixels.reshape(-1, 3).tolist()}
    near = {c for c in colours if any(np.abs(np.array(c) - e).max() < 2 for e in (*one, *two, *none))}
    found = panels(tmp_path / "a.png", near)
    assert len(found) == 4
    for panel, expected in zip(found, (one, two, none, none), strict=True):
        assert np.abs(np.array(tokens(panel)) - np.array(expected)).max() < 2
    words = Drawing(tmp_path / "a.svg").words
    assert [word for word in words if word.startswith("layer")] == [
        "layer 5: 90%", "layer 11: 10%", "layer 5: none", "layer 11: none",
    ]  # fmt: skip
    assert [word for word in words if word.startswith("into")] == ["into this", "into that"]
