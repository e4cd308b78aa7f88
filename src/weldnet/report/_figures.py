"""The figures of results: methods beside one another, and what changes with N, size, data and other numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from weldnet.report._colours import token
from weldnet.report._numbers import Metric, Value, metric
from weldnet.report._page import Figure, Gallery, Section, Series
from weldnet.report._plot import Drawing, Style, axis, escape, rounded, styles
from weldnet.report._results import primary
from weldnet.report._summary import Key, Summary, condition_text, groups_of, label, setting_text

__all__ = ["standings", "sweeps"]

_PUBLISHED = Style(token("published"), "diamond-open", "")
_MOST_SERIES = 8
_OWN_WORDS = ("clients", "round")


def standings(summaries: Sequence[Summary]) -> list[Gallery]:
    """Return for each setting and condition a figure of all methods: every repeat, the mean, what papers say."""
    figures: list[Figure] = []
    name = primary(summaries)
    for group in groups_of(summaries, lambda summary: (*summary.setting, *summary.condition)).values():
        rows = {summary.row for summary in group if name in summary.values}
        if name is not None and len(rows) > 1:
            figures.append(_standing(group, metric(name)))
    several = any(value.count > 1 for summary in summaries for value in summary.values.values())
    caption = "Small marks: every repeat. Large marks: the mean, with one standard deviation." if several else ""
    if any(summary.published for summary in summaries):
        caption += " Open diamonds: published numbers, which others measured under their own conditions."
    return [Gallery(figures=tuple(figures), title="Method by method", caption=caption.strip())] if figures else []


def _standing(group: Sequence[Summary], shown: Metric) -> Figure:
    group = [summary for summary in group if shown.key in summary.values]
    rows = list(dict.fromkeys(summary.row for summary in group))
    place = {row: len(rows) - 1 - index for index, row in enumerate(rows)}
    looks = styles(rows)
    drawing = Drawing()
    for summary in group:
        at, value = place[summary.row], summary.values[shown.key]
        if summary.published:
            drawing.add("published", _PUBLISHED, _published(summary, at, value, shown), lines=False)
        else:
            traces = _repeats(looks[summary.row], at, value, shown), _mean(looks[summary.row], summary, at, shown)
            drawing.add(label(summary.row), looks[summary.row], *traces, lines=False)
    first = group[0]
    where = ", ".join(filter(None, [setting_text(first.setting), condition_text(first.condition)]))
    ticks = [escape(label(row)) for row in rows]
    layout = {
        "xaxis": axis(shown.heading),
        "yaxis": {
            "tickvals": [place[row] for row in rows],
            "ticktext": ticks,
            "range": [-0.6, len(rows) - 0.4],
            "showgrid": True,
            "zeroline": False,
        },
        "margin": {"l": 10, "t": 6},
    }
    figure = drawing.figure(
        name=f"methods-{where}",
        title=where or shown.label.capitalize(),
        alt=f"{shown.label.capitalize()} by method. " + _words(group, shown),
        layout=layout,
        height=84 + 26 * len(rows),
    )
    return replace(figure, series=_origins(group, figure))  # the axis names the methods


def _origins(group: Sequence[Summary], figure: Figure) -> tuple[Series, ...]:
    """Return a legend that tells measured marks from published ones, if there are both."""
    traces: dict[bool, list[int]] = {False: [], True: []}
    for summary, series in zip(group, figure.series, strict=True):
        traces[summary.published] += series.traces
    if not (traces[False] and traces[True]):
        return ()
    ours = Series(label="measured", colour=token("muted"), traces=tuple(reversed(traces[False])))
    theirs = Series(label="published", colour=_PUBLISHED.colour, symbol=_PUBLISHED.symbol, traces=tuple(traces[True]))
    return ours, theirs


def _repeats(style: Style, at: float, value: Value, shown: Metric) -> Mapping[str, Any]:
    each = value.each if value.count > 1 else ()
    return {
        "type": "scatter",
        "mode": "markers",
        "x": rounded(shown.scale * one for one in each),
        "y": [at] * len(each),
        "marker": {"color": f"{style.colour}/0.4", "size": 5, "symbol": "circle"},
        "hoverinfo": "skip",
    }


def _mean(style: Style, summary: Summary, at: float, shown: Metric) -> Mapping[str, Any]:
    value = summary.values[shown.key]
    spread = f" ± {shown.text(value.spread)}" if value.spread is not None else ""
    words = f"{escape(label(summary.row))}: {shown.text(value.mean)}{spread} (n = {value.count})"
    return {
        "type": "scatter",
        "mode": "markers",
        "x": rounded([shown.scale * value.mean]),
        "y": [at],
        "error_x": {
            "type": "data",
            "array": rounded([shown.scale * (value.spread or 0.0)]),
            "color": style.colour,
            "thickness": 1.5,
            "width": 4,
        },
        "marker": {
            "color": style.colour,
            "size": 11,
            "symbol": style.symbol,
            "line": {"width": 2 if "open" in style.symbol or "line" in style.symbol else 0, "color": style.colour},
        },
        "hovertemplate": words + "<extra></extra>",
    }


def _published(summary: Summary, at: float, value: Value, shown: Metric) -> Mapping[str, Any]:
    words = f"published, {escape(label(summary.row))}: {shown.text(value.mean)}<br>{escape(summary.source)}"
    return {
        "type": "scatter",
        "mode": "markers",
        "x": rounded([shown.scale * value.mean]),
        "y": [at - 0.22],
        "marker": {"color": _PUBLISHED.colour, "size": 9, "symbol": "diamond-open", "line": {"width": 1.5}},
        "hovertemplate": words + "<extra></extra>",
    }


def _words(group: Sequence[Summary], shown: Metric) -> str:
    texts = [
        f"{label(s.row)} {shown.with_unit(s.values[shown.key].mean)}{' (published)' if s.published else ''}"
        for s in group
    ]
    return "; ".join(texts) + "."


# -- what changes with what ------------------------------------------------------------------------


def sweeps(summaries: Sequence[Summary]) -> list[Section]:
    """Return a figure for everything that was varied: N, size, the data that repairs used, options of methods."""
    ours = [summary for summary in summaries if not summary.published]
    figures: list[Figure] = []
    for group in groups_of(ours, lambda summary: summary.setting).values():
        for word in _varied(group):
            figures += _sweep(group, word, "accuracy")
            if word not in ("networks", "size", "samples"):  # whatever else was varied, it was for the barrier's sake
                figures += _sweep(group, word, "barrier")
    if not figures:
        return []
    caption = "Lines join means; bands are one standard deviation over repeats."
    blocks = (Gallery(figures=tuple(figures), caption=caption),)
    return [Section(name="sweeps", title="What it depends on", blocks=blocks)]


def _varied(group: Sequence[Summary]) -> Iterator[str]:
    """Yield the words whose numbers differ; ``samples`` stands for the inputs that were used."""
    words = dict.fromkeys(word for summary in group for word in summary.cell if word not in _OWN_WORDS)
    for word in words:
        found = {summary.cell[word] for summary in group if _position(summary, word) is not None}
        if len(found) > 1 or (word == "size" and found):  # size 1 goes without saying
            yield word
    if "samples" not in words and len({_position(summary, "samples") for summary in group} - {None}) > 1:
        yield "samples"


def _position(summary: Summary, word: str) -> float | None:
    if word == "samples":
        return summary.values[word].mean if word in summary.values else None
    found = summary.cell.get(word, 1.0 if word == "size" else None)
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def _sweep(group: Sequence[Summary], word: str, name: str) -> list[Figure]:
    """Return a figure for each condition but the varied word."""
    figures: list[Figure] = []
    usable = [summary for summary in group if name in summary.values and _position(summary, word) is not None]
    for rest in groups_of(usable, lambda s: tuple(entry for entry in s.condition if entry[0] != word)).values():
        if len({_position(summary, word) for summary in rest}) < 2:
            continue
        if word == "samples" and all(word not in summary.cell for summary in rest):
            if dict(rest[0].condition).get("stage", "one-shot") == "one-shot":
                figures.append(_appetites(rest, metric(name)))
        else:
            figures.append(_one_sweep(rest, word, metric(name)))
    return figures


def _appetites(group: Sequence[Summary], shown: Metric) -> Figure:
    """Draw what repairs and methods are worth against the inputs that each of them reads: marks, no lines."""
    looks = styles((("method", summary.method),) for summary in group)
    drawing = Drawing()
    alt: list[str] = []
    for row, members in groups_of(group, lambda summary: (("method", summary.method),)).items():
        if members[0].reference:
            continue
        style = looks[row]
        values = [summary.values[shown.key] for summary in members]
        texts = [f"{label(s.row)}: {shown.text(v.mean)}" for s, v in zip(members, values, strict=True)]
        trace = {
            "type": "scatter",
            "mode": "markers",
            "x": rounded(_position(summary, "samples") for summary in members),
            "y": rounded(shown.scale * value.mean for value in values),
            "error_y": {
                "array": rounded(shown.scale * (v.spread or 0.0) for v in values),
                "color": f"{style.colour}/0.5",
            },
            "marker": {"symbol": style.symbol, "size": 9, "color": style.colour},
            "customdata": [escape(text) for text in texts],
            "hovertemplate": "%{customdata}, %{x:,} inputs<extra></extra>",
        }
        drawing.add(label(row), style, trace, lines=False)
        alt += texts
    where = ", ".join(filter(None, [setting_text(group[0].setting), condition_text(group[0].condition)]))
    return drawing.figure(
        name=f"{shown.key}-by-samples-{where}",
        title=f"{shown.label.capitalize()} against unlabelled inputs used",
        caption=f"{where}; a mark for each repair",
        alt=f"{shown.label.capitalize()} against the unlabelled inputs that were read: {'; '.join(alt)}.",
        layout={"xaxis": axis("unlabelled inputs used"), "yaxis": axis(shown.heading)},
    )


def _one_sweep(group: Sequence[Summary], word: str, shown: Metric) -> Figure:
    shown_words = {"networks": "number of networks", "size": "size, in parents", "samples": "unlabelled inputs"}
    across = shown_words.get(word, word.replace("_", " "))
    series = groups_of(group, lambda summary: tuple(entry for entry in summary.row if entry[0] != word))
    left_off = len(series)
    series = _fewer(series, shown)
    left_off -= len(series)
    looks = styles(series)
    drawing = Drawing()
    alt: list[str] = []
    for row, members in series.items():
        if word != "networks" and members[0].reference and len(members) < 2:
            continue  # it does not depend on what was varied
        members = sorted(members, key=lambda summary: _position(summary, word) or 0.0)
        x = [_position(summary, word) or 0.0 for summary in members]
        values = [summary.values[shown.key] for summary in members]
        drawing.line(label(row), looks[row], x, values, shown.scale)
        ends = f"{shown.text(values[0].mean)} at {x[0]:g} to {shown.text(values[-1].mean)} at {x[-1]:g}"
        alt.append(f"{label(row)} {ends}")
    first = group[0]
    rest = tuple(entry for entry in first.condition if entry[0] != word)
    where = ", ".join(filter(None, [setting_text(first.setting), condition_text(rest)]))
    positions = sorted({_position(summary, word) or 0.0 for summary in group})
    ticks = {"tickvals": positions} if len(positions) <= 8 and word != "samples" else {}
    if word == "networks" and positions[0] > 0 and positions[-1] / positions[0] >= 4:
        ticks = {**ticks, "type": "log", "ticktext": [f"{position:g}" for position in positions]}
    return drawing.figure(
        name=f"{shown.key}-by-{word}-{where}",
        title=f"{shown.label.capitalize()} against {across}",
        caption=where + ("; each method with its best repair" if left_off else ""),
        alt=f"{shown.label.capitalize()} against {across}: {'; '.join(alt)}.",
        layout={"xaxis": axis(across, **ticks), "yaxis": axis(shown.heading)},
    )


def _fewer(series: Mapping[Key, list[Summary]], shown: Metric) -> dict[Key, list[Summary]]:
    """Keep of many series only the best of each method: more than eight lines cannot be told apart."""
    if len(series) <= _MOST_SERIES:
        return dict(series)
    sign = -1 if shown.better == "high" else 1
    worth = {row: (-len(all_), sign * fmean(s.values[shown.key].mean for s in all_)) for row, all_ in series.items()}
    by_method = groups_of(series, lambda row: tuple(entry for entry in row if entry[0] != "repair"))
    return {row: series[row] for rows in by_method.values() for row in (min(rows, key=lambda row: worth[row]),)}
