"""Lines: barriers between networks, and how networks were trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weldnet._words import counted
from weldnet.records import Record
from weldnet.report._colours import token
from weldnet.report._numbers import Metric, metric
from weldnet.report._page import Figure, Gallery, Section
from weldnet.report._plot import Drawing, Style, axis, over_repeats, rounded, styles
from weldnet.report._summary import CONDITION, SETTING, Key, condition_text, groups_of, label, normal, setting_text

__all__ = ["curves", "training"]

#: What is drawn of a network's training, and what it is called.
_HISTORY = ("loss", "accuracy", "validation")
_MOST_LINES = 60


def curves(records: Sequence[Record]) -> list[Section]:
    """Return a figure for each setting and each number along the lines: the mean of the repeats with a band."""
    figures: list[Figure] = []
    for where, group in sorted(groups_of(records, _where).items(), key=lambda entry: _networks(entry[0])):
        names = dict.fromkeys(name for record in group for name in _ordinates(record))
        figures += [figure for name in names if (figure := _curve(where, group, name)) is not None]
    if not figures:
        return []
    caption = (
        "The straight line from one network (t = 0) to another that was aligned to it (t = 1). A barrier is a rise "
        "above the line between both ends. Bands are one standard deviation over groups."
    )
    return [
        Section(name="barriers", title="Between networks", blocks=(Gallery(figures=tuple(figures), caption=caption),))
    ]


def _where(record: Record) -> Key:
    cell = normal(record.cell)
    words = (*SETTING, "networks", "size")
    about = str(record.extra.get("about", "barrier"))
    return (*((word, cell[word]) for word in words if word in cell), ("about", about))


def _networks(where: Key) -> float:
    """Return the number of networks, by which figures are ordered; the sort keeps the order of settings otherwise."""
    count = dict(where).get("networks")
    return float(count) if isinstance(count, int | float) else 0.0


def _ordinates(record: Record) -> dict[str, Sequence[Any]]:
    found = record.extra.get("y")
    return {str(name): y for name, y in found.items() if isinstance(y, list)} if isinstance(found, dict) else {}


def _curve(where: Key, group: Sequence[Record], name: str) -> Figure | None:
    shown = metric(name)
    series = groups_of((record for record in group if name in _ordinates(record)), _row)
    looks = styles(series)
    drawing = Drawing()
    alt: list[str] = []
    for row, members in series.items():
        x, values = over_repeats([(record.extra.get("x") or [], _ordinates(record)[name]) for record in members])
        if len(x) < 2:
            continue
        drawing.line(_line_name(row) or shown.label, looks[row], x, values, shown.scale)
        means = [value.mean for value in values]
        middle = min(means) if shown.better == "high" else max(means)
        word = "at the least" if shown.better == "high" else "at the most"
        alt.append(f"{_line_name(row)} {shown.with_unit(means[0])} at the start, {shown.with_unit(middle)} {word}")
    if not len(drawing):
        return None
    about = str(dict(where)["about"])
    title = f"{shown.label.capitalize()} on the line" if about == "barrier" else f"{about}: {shown.label}"
    place = ", ".join(filter(None, [setting_text(where), condition_text(where, stage=False)]))
    across = str(group[0].extra.get("x_label") or "t, position on the line")
    return drawing.figure(
        name=f"{title}-{place}",
        title=title,
        caption=place,
        alt=f"{', '.join(filter(None, [title, place]))}: {'; '.join(alt)}.",
        layout={"xaxis": axis(across), "yaxis": axis(shown.heading)},
    )


def _line_name(row: Key) -> str:
    """Name a line; the one to a network that was not aligned is the naive average's."""
    return "not aligned" if row == (("method", "naive"),) else label(row)


def _row(record: Record) -> Key:
    cell = normal(record.cell)
    return tuple((word, entry) for word, entry in cell.items() if word not in (*SETTING, *CONDITION))


# -- training --------------------------------------------------------------------------------------


def training(records: Sequence[Record]) -> list[Section]:
    """Return how the networks were trained: a line a network, loss and accuracy apart."""
    figures: list[Figure] = []
    usable = [record for record in records if isinstance(record.extra.get("history"), list)]
    for where, group in groups_of(usable, lambda record: tuple(_setting(record).items())).items():
        for name in _HISTORY:
            lines = [(record, *_history(record, name)) for record in group]
            lines = [line for line in lines if len(line[1]) > 1]
            if lines:
                figures.append(_training_figure(where, lines[:_MOST_LINES], len(lines), name))
    if not figures:
        return []
    caption = "One line a network; the heavy line is their mean."
    return [
        Section(name="training", title="How the networks were trained", blocks=(_gallery(figures, caption),)),
    ]


def _gallery(figures: Sequence[Figure], caption: str) -> Gallery:
    return Gallery(figures=tuple(figures), caption=caption)


def _setting(record: Record) -> dict[str, Any]:
    cell = normal(record.cell)
    return {word: cell[word] for word in SETTING if word in cell}


def _history(record: Record, name: str) -> tuple[list[float], list[float]]:
    """Return epochs and numbers of one history, those that are numbers."""
    found = [entry for entry in record.extra["history"] if isinstance(entry, dict)]
    x, values = over_repeats(
        [([entry.get("epoch", i + 1) for i, entry in enumerate(found)], [e.get(name) for e in found])]
    )
    return x, [value.mean for value in values]


def _training_figure(
    where: Key, lines: Sequence[tuple[Record, list[float], list[float]]], total: int, name: str
) -> Figure:
    shown = _history_metric(name)
    drawing = Drawing()
    thin, heavy = Style(token("muted"), "circle", "solid"), Style(token("gamf"), "circle", "solid")
    if len(lines) > 1:
        traces = [_thin(record, x, y, shown) for record, x, y in lines]
        drawing.add(counted(len(lines), "network"), thin, *traces)
    x, values = over_repeats([(x, y) for _, x, y in lines])
    mean = {
        "type": "scatter",
        "mode": "lines",
        "x": rounded(x),
        "y": rounded(shown.scale * value.mean for value in values),
        "line": {"color": token("gamf"), "width": 2.5},
        "hovertemplate": "epoch %{x}: %{y:.4~g}<extra></extra>",
    }
    drawing.add("mean" if len(lines) > 1 else "network", heavy, mean)
    place = setting_text(where)
    left_out = f" (the first {len(lines)} of {total} networks)" if total > len(lines) else ""
    first, last = shown.with_unit(values[0].mean), shown.with_unit(values[-1].mean)
    return drawing.figure(
        name=f"training-{name}-{place}",
        title=shown.label.capitalize(),
        caption=place + left_out,
        alt=f"{shown.label.capitalize()} of {counted(total, 'network')} by epoch: on average from {first} to {last}.",
        layout={"xaxis": axis("epoch"), "yaxis": axis(shown.heading)},
        height=280,
    )


def _thin(record: Record, x: list[float], y: list[float], shown: Metric) -> dict[str, Any]:
    seed = "" if record.seed is None else f"seed {record.seed}, "
    return {
        "type": "scatter",
        "mode": "lines",
        "x": rounded(x),
        "y": rounded(shown.scale * value for value in y),
        "line": {"color": f"{token('muted')}/0.45", "width": 1},
        "hovertemplate": f"{seed}epoch %{{x}}: %{{y:.4~g}}<extra></extra>",
    }


def _history_metric(name: str) -> Metric:
    words = {"loss": "training loss", "accuracy": "training accuracy", "validation": "held-out accuracy"}
    like = metric("accuracy" if name == "validation" else name)
    return Metric(name, words[name], like.unit, like.scale, like.form, like.better)
