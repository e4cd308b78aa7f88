"""Who went where: heat maps of the couplings."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weldnet.records import Record
from weldnet.report._colours import token
from weldnet.report._page import Block, Figure, Gallery, Section
from weldnet.report._plot import is_number, slug
from weldnet.report._summary import CONDITION, SETTING, Key, condition_text, groups_of, label, normal, setting_text

__all__ = ["couplings"]

_SHOWN_UNITS = 128
"""A larger coupling is shown in squares of several units."""
_SHOWN_SPACES = 12
_SHOWN_COUPLINGS = 6


def couplings(records: Sequence[Record]) -> list[Section]:
    """Return heat maps of the couplings: the first group of each method, its first spaces."""
    firsts = groups_of(records, _about)
    blocks: list[Block] = [
        gallery
        for about, group in list(firsts.items())[:_SHOWN_COUPLINGS]
        if (gallery := _maps(about, group[0])) is not None
    ]
    if not blocks:
        return []
    intro = (
        "Rows are units of the network, columns units of the fused one; the stronger the colour, the more of a unit "
        "goes there. A one-to-one coupling has one mark in every row and column."
    )
    if len(firsts) > _SHOWN_COUPLINGS:
        intro += f" The first {_SHOWN_COUPLINGS} of {len(firsts)} are shown."
    return [Section(name="couplings", title="Who went where", blocks=tuple(blocks), intro=intro)]


def _about(record: Record) -> Key:
    return tuple(normal(record.cell).items())


def _maps(about: Key, record: Record) -> Gallery | None:
    found = record.extra.get("spaces")
    maps = {str(space): _coupling(entry) for space, entry in found.items()} if isinstance(found, dict) else {}
    usable = {space: coupling for space, coupling in maps.items() if coupling is not None}
    if not usable:
        return None
    title = _title(about)
    figures = [_map(space, coupling, title) for space, coupling in list(usable.items())[:_SHOWN_SPACES]]
    left = len(usable) - len(figures)
    caption = f"{left} more spaces are not shown." if left else ""
    return Gallery(figures=tuple(figures), title=title, caption=caption, small=True)


def _title(about: Key) -> str:
    row = tuple(entry for entry in about if entry[0] not in (*SETTING, *CONDITION, "network"))
    network = dict(about).get("network")
    parts = [setting_text(about), condition_text(about, stage=False), label(row)]
    return ", ".join(filter(None, [*parts, f"network {network}" if network is not None else ""]))


@dataclass(frozen=True)
class _Map:
    """A coupling to be drawn: so many units to so many, in squares of ``step``; the share that stays where it was."""

    values: np.ndarray[Any, Any]
    units: tuple[int, int]
    stayed: float | None

    @property
    def step(self) -> int:
        return -(-max(self.units) // max(self.values.shape))


def _coupling(entry: object) -> _Map | None:
    """Read a coupling: a matrix, a pooled one with its ``units``, or a permutation's source of each universe unit."""
    if isinstance(entry, Mapping):
        found, units = _numbers_of(entry.get("matrix")), entry.get("units")
        if found is None or found.ndim != 2 or not isinstance(units, list | tuple) or len(units) != 2:
            return None
        if not all(is_number(count) and count >= size for count, size in zip(units, found.shape, strict=True)):
            return None
        whole = found if list(found.shape) == list(units) else None
        return _Map(found, (int(units[0]), int(units[1])), None if whole is None else _stayed(whole))
    found = _numbers_of(entry)
    if found is not None and found.ndim == 1 and np.array_equal(np.sort(found), np.arange(found.size)):
        return _permutation(found.astype(np.int64))
    if found is None or found.ndim != 2:
        return None
    rows, columns = found.shape
    return _Map(_binned(found, -(-max(found.shape) // _SHOWN_UNITS)), (rows, columns), _stayed(found))


def _permutation(source: np.ndarray[Any, Any]) -> _Map:
    """Count the units of each square; a matrix of all units may be too large."""
    each = np.arange(source.size)
    step = -(-source.size // _SHOWN_UNITS)
    squares = np.zeros((-(-source.size // step),) * 2)
    np.add.at(squares, (source // step, each // step), 1.0)
    return _Map(squares, (source.size, source.size), float((source == each).mean()))


def _numbers_of(entry: object) -> np.ndarray[Any, Any] | None:
    try:
        found = np.asarray(entry, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return found if found.size and bool(np.isfinite(found).all()) and float(found.min()) >= 0 else None


def _stayed(matrix: np.ndarray[Any, Any]) -> float | None:
    total = float(matrix.sum())
    return float(np.trace(matrix)) / total if matrix.shape[0] == matrix.shape[1] and total else None


def _map(space: str, coupling: _Map, title: str) -> Figure:
    units, universe = coupling.units
    step = coupling.step
    # Bytes as far as they reach: a permutation is whole numbers, and pictures of shares need no more.
    top = float(coupling.values.max()) or 1.0
    values = np.round(coupling.values / top * 255).astype(np.uint8)
    trace = {
        "type": "heatmap",
        "z": _packed(values),
        "zmin": 0,
        "zmax": 255,
        "colorscale": [[0, token("heat0")], [0.5, token("heat1")], [1, token("heat2")]],
        "showscale": False,
        "x0": 0,
        "dx": step,
        "y0": 0,
        "dy": step,
        "hovertemplate": "unit %{y} to %{x}<extra></extra>",
    }
    stayed = coupling.stayed
    caption = f"{units} \u00d7 {universe} units" + ("" if stayed is None else f", {1 - stayed:.0%} moved")
    caption += f"; each square sums {step} \u00d7 {step}" if step > 1 else ""
    return Figure(
        name="couplings-" + slug(f"{title}-{space}"),
        title=space,
        caption=caption,
        alt=f"Coupling of space {space}: {units} units onto {universe}"
        + ("." if stayed is None else f"; {stayed:.1%} stay at their number."),
        traces=(trace,),
        layout={
            "xaxis": {"showgrid": False, "constrain": "domain", "zeroline": False, "nticks": 4},
            "yaxis": {
                "showgrid": False,
                "autorange": "reversed",
                "scaleanchor": "x",
                "constrain": "domain",
                "zeroline": False,
                "nticks": 4,
            },
            "margin": {"l": 30, "r": 6, "t": 4, "b": 24},
        },
        height=220,
    )


def _packed(values: np.ndarray[Any, Any]) -> dict[str, str]:
    """Write bytes as Plotly reads them: a sixth of what numbers would take."""
    shape = ", ".join(map(str, values.shape))
    return {"dtype": "u1", "bdata": base64.b64encode(values.tobytes()).decode(), "shape": shape}


def _binned(matrix: np.ndarray[Any, Any], step: int) -> np.ndarray[Any, Any]:
    """Sum squares of several units."""
    if step == 1:
        return matrix
    rows, columns = (-(-size // step) * step for size in matrix.shape)
    padded = np.zeros((rows, columns))
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded.reshape(rows // step, step, columns // step, step).sum((1, 3))
