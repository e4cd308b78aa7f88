"""What happened inside: variances layer by layer, and how well each space was matched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from weldnet.report._colours import token
from weldnet.report._numbers import value_of
from weldnet.report._page import Block, Cell, Column, Figure, Gallery, Row, Section, Table
from weldnet.report._plot import Drawing, Style, axis, escape, is_number, rounded, styles
from weldnet.report._summary import (
    Key,
    Summary,
    condition_text,
    groups_of,
    label,
    setting_text,
)

__all__ = ["spaces", "variances"]

_TICK_LETTERS = 22
_MARKS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "hexagon")


def variances(summaries: Sequence[Summary]) -> list[Section]:
    """Return for each setting and condition how much variance each layer has before and after repair."""
    figures: list[Figure] = []
    with_layers = [summary for summary in summaries if not summary.published and _layers(summary)]
    with_layers = _one_shot(with_layers)  # training on changes variances too, but is no repair
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


def _one_shot(summaries: Sequence[Summary]) -> Sequence[Summary]:
    """Leave out what was trained on after fusing, if there is something else."""
    return [summary for summary in summaries if summary.cell.get("stage") == "one-shot"] or summaries


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
    looks = _looks(group)
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
        drawing.add(label(summary.row), style, *traces)
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


def _looks(group: Sequence[Summary]) -> dict[Key, Style]:
    """Give methods their colours, and repairs marks: open and full ones tell before from after."""
    repairs = list(dict.fromkeys(summary.cell.get("repair") for summary in group))
    marks = {repair: _MARKS[index % len(_MARKS)] for index, repair in enumerate(repairs)}
    found = styles(summary.row for summary in group)
    return {s.row: replace(found[s.row], symbol=marks[s.cell.get("repair")], dash="solid") for s in group}


def _layer_line(
    summary: Summary, found: Mapping[str, tuple[float, float]], place: Mapping[str, int], style: Style, word: str
) -> dict[str, Any]:
    index = ("before", "after").index(word)
    mark = style.symbol + ("-open" if word == "before" else "")
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


def _short(layer: str) -> str:
    name = layer or "the network"
    return name if len(name) <= _TICK_LETTERS else f"…{name[1 - _TICK_LETTERS :]}"


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
    with_spaces = _one_shot([summary for summary in summaries if _diagnoses(summary)])
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
