"""What happened inside: variances layer by layer, who went where, how well each space was matched."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from weldnet.records import Record
from weldnet.report._colours import token
from weldnet.report._numbers import value_of
from weldnet.report._page import Block, Cell, Column, Figure, Gallery, Row, Section, Table
from weldnet.report._plot import Drawing, Style, axis, escape, is_number, rounded, slug, styles
from weldnet.report._summary import (
    CONDITION,
    SETTING,
    Key,
    Summary,
    condition_text,
    groups_of,
    label,
    normal,
    setting_text,
)

__all__ = ["couplings", "spaces", "variances"]

_SHOWN_UNITS = 128
"""A larger coupling is shown in squares of several units."""
_SHOWN_SPACES = 12
_SHOWN_COUPLINGS = 6
_TICK_LETTERS = 22


def variances(summaries: Sequence[Summary]) -> list[Section]:
    """Return for each setting and condition how much variance each layer has before and after repair."""
    figures: list[Figure] = []
    with_layers = [summary for summary in summaries if not summary.published and _layers(summary)]
    one_shot = [summary for summary in with_layers if summary.cell.get("stage") == "one-shot"]
    with_layers = one_shot or with_layers  # training on changes them, but is no repair
    for where, group in groups_of(with_layers, lambda s: (*s.setting, *s.condition)).items():
        # What was not repaired is the start of what was.
        repaired = {summary.method for summary in group if "repair" in summary.cell}
        shown = [summary for summary in group if "repair" in summary.cell or summary.method not in repaired]
        figures.append(_variance_figure(where, shown))
    if not figures:
        return []
    caption = (
        "The variance of each layer's outputs in the fused network, in parts of the parents': 1 is as much as they "
        "have. Averaging shrinks it (open marks, dotted); a repair is to bring it back (full marks)."
    )
    gallery = Gallery(figures=tuple(figures), caption=caption)
    return [Section(name="variances", title="Variance, layer by layer", blocks=(gallery,))]


def _layers(summary: Summary) -> dict[str, tuple[float, float]]:
    """Return before and after of every layer, the mean over repeats."""
    found: dict[str, list[tuple[float, float]]] = {}
    for record in summary.records:
        ratios = record.extra.get("variances")
        for layer, pair in ratios.items() if isinstance(ratios, dict) else ():
            if isinstance(pair, list | tuple) and len(pair) == 2 and all(map(is_number, pair)):
                found.setdefault(str(layer), []).append((float(pair[0]), float(pair[1])))
    return {layer: (_mean(p[0] for p in pairs), _mean(p[1] for p in pairs)) for layer, pairs in found.items()}


def _mean(numbers: Any) -> float:
    value = value_of(numbers)
    assert value is not None
    return value.mean


def _variance_figure(where: Key, group: Sequence[Summary]) -> Figure:
    looks = styles(summary.row for summary in group)
    layers = list(dict.fromkeys(layer for summary in group for layer in _layers(summary)))
    place = {layer: index for index, layer in enumerate(layers)}
    drawing = Drawing()
    alt: list[str] = []
    for summary in group:
        found, style = _layers(summary), looks[summary.row]
        repaired = any(before != after for before, after in found.values())
        traces = [_layer_line(summary, found, place, style, "after")]
        if repaired:
            traces.insert(0, _layer_line(summary, found, place, style, "before"))
        drawing.add(label(summary.row), replace(style, symbol=_filled(style.symbol), dash="solid"), *traces)
        for index, word in [(0, "before repair"), (1, "after it")] if repaired else [(1, "not repaired")]:
            ratios = [pair[index] for pair in found.values()]
            alt.append(f"{label(summary.row)} {min(ratios):.2f} to {max(ratios):.2f} {word}")
    title = ", ".join(filter(None, [setting_text(where), condition_text(where)])) or "Variance of outputs"
    ticks = {
        "tickvals": list(place.values()),
        "ticktext": [escape(_short(layer)) for layer in layers],
        "tickangle": -40,
    }
    one = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 1, "y1": 1, "layer": "below"}
    return drawing.figure(
        name=f"variances-{title}",
        title=title,
        alt=f"Variance ratios of {len(layers)} layers: {'; '.join(alt)}.",
        layout={
            "xaxis": {**ticks, "automargin": True},
            "yaxis": axis("variance, in parts of the parents'", rangemode="tozero"),
            "shapes": [{**one, "line": {"color": token("muted"), "width": 1, "dash": "dash"}}],
        },
        height=380,
    )


def _layer_line(
    summary: Summary, found: Mapping[str, tuple[float, float]], place: Mapping[str, int], style: Style, word: str
) -> dict[str, Any]:
    index = ("before", "after").index(word)
    mark = _filled(style.symbol) + ("-open" if word == "before" else "")
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [place[layer] for layer in found],
        "y": rounded(pair[index] for pair in found.values()),
        "customdata": [escape(layer or "the network") for layer in found],
        "line": {"color": style.colour, "width": 1.5, "dash": ("dot", "solid")[index]},
        "marker": {"color": style.colour, "symbol": mark, "size": 8},
        "hovertemplate": f"{escape(label(summary.row))}, {word} repair<br>%{{customdata}}: %{{y:.3f}}<extra></extra>",
    }


def _filled(symbol: str) -> str:
    return symbol.removesuffix("-open")


def _short(layer: str) -> str:
    name = layer or "the network"
    return name if len(name) <= _TICK_LETTERS else f"…{name[1 - _TICK_LETTERS :]}"


# -- who went where --------------------------------------------------------------------------------


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
        "Rows are units of the network, columns units of the fused one; the darker, the more of a unit goes there. A "
        "one-to-one coupling has one mark in every row and column."
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
        matrix = np.zeros((found.size, found.size))
        matrix[found.astype(int), np.arange(found.size)] = 1.0
        found = matrix
    if found is None or found.ndim != 2:
        return None
    rows, columns = found.shape
    return _Map(_binned(found, -(-max(found.shape) // _SHOWN_UNITS)), (rows, columns), _stayed(found))


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


# -- how well --------------------------------------------------------------------------------------

_SPACE_COLUMNS: Mapping[str, tuple[str, str, float, str]] = {
    "units": ("units", "", 1.0, ",.0f"),
    "moved": ("moved, %", "share of the units that change their number", 100.0, ".1f"),
    "quality": ("match quality", "mean cosine between matched units; 1 for equal ones", 1.0, ".4f"),
    "unaligned": ("unaligned", "the same between units of equal number", 1.0, ".4f"),
    "cost": ("cost", "0 for equal units, 1 for unrelated ones", 1.0, ".4f"),
}


def spaces(summaries: Sequence[Summary]) -> list[Section]:
    """Return for each result that has them a table of its spaces: how well the units of each were matched."""
    with_spaces = [summary for summary in summaries if _diagnoses(summary)]
    groups = groups_of(with_spaces, lambda summary: summary.setting)
    blocks: list[Block] = [_space_table(setting, group) for setting, group in groups.items()]
    if not blocks:
        return []
    intro = (
        "Match quality is the mean cosine between the weights of matched units, beside that of units of equal number; "
        "cost is their distance, 0 for equal units and 1 for unrelated ones."
    )
    return [Section(name="spaces", title="How well units matched", blocks=tuple(blocks), intro=intro)]


def _diagnoses(summary: Summary) -> dict[str, dict[str, float]]:
    """Return the numbers of every space, the mean over repeats."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for record in summary.records:
        rows = record.extra.get("spaces")
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, dict) and "space" in row:
                found.setdefault(str(row["space"]), []).append(row)
    return {
        space: {name: value.mean for name in _SPACE_COLUMNS if (value := value_of(_numbers(rows, name))) is not None}
        for space, rows in found.items()
    }


def _numbers(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if is_number(row.get(name))]


def _space_table(setting: Key, group: Sequence[Summary]) -> Table:
    found = [(summary, _diagnoses(summary)) for summary in group]
    names = [name for name in _SPACE_COLUMNS if any(name in row for _, rows in found for row in rows.values())]
    several = len(group) > 1
    rows: list[Row] = []
    for summary, spaces_of in found:
        how = ", ".join(filter(None, [label(summary.row), condition_text(summary.condition)]))
        for space, row in spaces_of.items():
            cells = [Cell(text=space), *([Cell(text=how, key=summary.method)] if several else [])]
            for name in names:
                _, _, scale, form = _SPACE_COLUMNS[name]
                number = row.get(name)
                cells.append(Cell() if number is None else Cell(text=format(scale * number, form), number=number))
            rows.append(Row(cells=tuple(cells)))
    words = [Column(label="space"), *([Column(label="fused")] if several else [])]
    for name in names:
        heading, hint, _, _ = _SPACE_COLUMNS[name]
        words.append(Column(label=heading, hint=hint, origin="measured"))
    where = [setting_text(setting), "" if several else condition_text(group[0].condition)]
    return Table(
        title=", ".join(filter(None, where)) or "Spaces",
        columns=tuple(words),
        rows=tuple(rows),
        words=2 if several else 1,
        caption="Means over groups." if any(summary.repeats > 1 for summary in group) else "",
    )
