"""The paper's printed costs beside what its formula gives, and what would print the cells that differ; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

from vlmflow.core.cost import make_schedule, paper_flops
from vlmflow.core.geometry import GEOMETRIES, Geometry


@dataclass(frozen=True)
class PaperRow:
    """A TFLOPs and a ratio cell of the paper's Tables 1 and 2, as printed and by Eq. 10 as stated.

    ``note`` names what prints a cell that the stated setting does not; empty where both cells agree.
    """

    table: int
    model: str
    method: str
    setting: str
    printed_tflops: str
    tflops: float
    printed_ratio: str
    ratio: float
    note: str


# table, model, image tokens, K1, K2 (R1 = 50 %, R2 = 75 %); TFLOPs and ratio of baseline, FastV and HiMAP
_PRINTED = (
    (1, "llava-1.5-7b", 576, 2, 8, "2.98 100%", "1.56 54%", "0.73 24%"),
    (1, "llava-1.5-13b", 576, 3, 8, "5.81 100%", "3.09 53%", "1.36 23%"),
    (1, "qwen-vl-chat", 256, 2, 8, "3.6 100%", "1.9 53%", "0.89 25%"),
    (2, "llava-1.5-7b", 576, 2, 15, "2.98 100%", "1.56 54%", "1.01 34%"),
    (2, "llava-1.5-13b", 576, 3, 15, "5.81 100%", "3.06 53%", "1.93 33%"),
)


def paper_tables() -> tuple[PaperRow, ...]:
    """Recompute the TFLOPs and ratio columns of the paper's Tables 1 and 2, and search what prints each cell.

    A cell agrees if the computed figure, cut or rounded to the printed decimals, is the printed one. Where it
    does not, each K is varied over all layers; where a model's baseline does not, its image tokens (8 to
    1,024) and MLP width (m and 2m) are, until all its TFLOPs agree at once. Qwen-VL's do for 448 tokens and
    m = 22016: its images are 448 pixels wide, and its config.json says 22016 where its MLP is 11008 wide.
    """
    rows = []
    for table, model, tokens, k1, k2, *printed in _PRINTED:
        geometry, cells = GEOMETRIES[model], [cell.split() for cell in printed]
        whole = _halved_tflops(geometry, tokens, ())
        runs = (("Baseline", ()), ("FastV", (2,)), ("HiMAP", (k1, k2)))
        other = ""
        if not _prints(whole, cells[0][0]):
            other = _other_sizes(geometry, [(ks, cell[0]) for (_, ks), cell in zip(runs, cells, strict=True)])
        for (method, ks), (tflops, ratio) in zip(runs, cells, strict=True):
            value = _halved_tflops(geometry, tokens, ks)
            notes = [other] if other else [_other_layers(geometry, tokens, ks, Fraction(1), tflops, "TFLOPs")]
            notes.append(_other_layers(geometry, tokens, ks, 100 / whole, ratio[:-1], "ratio"))
            setting = ", ".join([f"n = {tokens}", *(f"{k} = {v}" for k, v in _named(ks))])
            note = "; ".join(filter(None, notes))
            share = float(value / whole)
            rows.append(PaperRow(table, model, method, setting, tflops, float(value), ratio, share, note))
    return tuple(rows)


def _named(ks: tuple[int, ...]) -> list[tuple[str, int]]:
    return list(zip(("K",) if len(ks) == 1 else ("K1", "K2"), ks, strict=False))


def _halved_tflops(geometry: Geometry, tokens: int, ks: tuple[int, ...]) -> Fraction:
    """Give Eq. 10's TFLOPs where 50 % of the image tokens go before layer K (K1), 75 % of the rest at K2."""
    drops = tuple(zip(ks, (tokens // 2, tokens // 8), strict=False))
    return Fraction(paper_flops(geometry, make_schedule(geometry.layers, tokens, drops)), 10**12)


def _prints(value: Fraction, printed: str) -> bool:
    """Tell whether a value, cut or rounded to as many decimals as were printed, is the printed one."""
    scale = 10 ** len(printed.partition(".")[2])
    return Fraction(printed) * scale in (value * scale // 1, round(value * scale))


def _other_layers(geometry: Geometry, tokens: int, ks: tuple[int, ...], unit: Fraction, printed: str, what: str) -> str:
    def fits(tried: tuple[int, ...]) -> bool:
        rising = all(a < b for a, b in pairwise(tried))
        return rising and _prints(unit * _halved_tflops(geometry, tokens, tried), printed)

    if fits(ks):
        return ""
    fitting = []
    for i, (name, _) in enumerate(_named(ks)):
        values = [str(k) for k in range(1, geometry.layers) if fits((*ks[:i], k, *ks[i + 1 :]))]
        fitting.append(f"{name} = {' or '.join(values)}" if values else f"fits no {name}")
    return f"{what} {printed}: {', '.join(fitting)}"


def _other_sizes(geometry: Geometry, cells: Sequence[tuple[tuple[int, ...], str]]) -> str:
    fitting = []
    for m in (geometry.intermediate, 2 * geometry.intermediate):
        sizes = range(8, 1025)
        for ks, printed in cells:
            model = replace(geometry, intermediate=m)
            sizes = [n for n in sizes if _prints(_halved_tflops(model, n, ks), printed)]
        fitting.append(f"n = {sizes[0]} to {sizes[-1]} at m = {m}" if sizes else f"fits no n at m = {m}")
    return f"TFLOPs {', '.join(printed for _, printed in cells)}: {', or '.join(fitting)}"
