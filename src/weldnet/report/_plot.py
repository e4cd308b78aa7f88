"""What figures share: marks for methods, lines with bands, escaped words, rounded numbers."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from weldnet.report._colours import DASHES, assign, symbol, token
from weldnet.report._numbers import Value, value_of
from weldnet.report._page import Figure, Series
from weldnet.report._summary import Key

__all__ = ["Drawing", "Style", "axis", "escape", "over_repeats", "rounded", "slug", "styles"]


@final
@dataclass(frozen=True)
class Style:
    """How a series looks."""

    colour: str
    symbol: str
    dash: str


def styles(rows: Iterable[Key], *, by: Sequence[str] = ("method",)) -> dict[Key, Style]:
    """Give every series its look: the colour says the method, mark and dashes say how it was used.

    Args:
        rows: the series.
        by: the words that choose the colour.
    """
    wanted = list(dict.fromkeys(rows))
    names = [_name(row, by) for row in wanted]
    colours = assign(names)
    used: dict[str, int] = {}
    found: dict[Key, Style] = {}
    for row, name in zip(wanted, names, strict=True):
        entry = colours[name]
        index = used[entry] = used.get(entry, -1) + 1
        mark = symbol(entry)
        found[row] = Style(token(entry), f"{mark}-open" if index % 2 else mark, DASHES[index % len(DASHES)])
    return found


def _name(row: Key, by: Sequence[str]) -> str:
    words = dict(row)
    return " ".join(str(words[word]) for word in by if word in words)


class Drawing:
    """A figure in the making: traces, and the legend that goes with them."""

    def __init__(self) -> None:
        self._traces: list[Mapping[str, Any]] = []
        self._series: list[Series] = []

    def __len__(self) -> int:
        return len(self._series)

    def add(self, label: str, style: Style, *traces: Mapping[str, Any], lines: bool = True) -> None:
        """Add a series: its traces, drawn in the given order, and its entry in the legend."""
        first = len(self._traces)
        for index, trace in enumerate(traces):
            shared = {"name": escape(label), "legendgroup": str(len(self._series)), "showlegend": index == 0}
            self._traces.append({**shared, **trace})
        numbers = tuple(range(first, len(self._traces)))
        self._series.append(Series(label=label, **_look(style, lines), traces=numbers))

    def line(self, label: str, style: Style, x: Sequence[float], values: Sequence[Value], scale: float = 1.0) -> None:
        """Add a line through means, with a band of one deviation where there are repeats."""
        mean = [scale * value.mean for value in values]
        trace = {
            "type": "scatter",
            "mode": "lines+markers" if len(x) <= _MARKED else "lines",
            "x": rounded(x),
            "y": rounded(mean),
            "line": {"color": style.colour, "width": 2, "dash": style.dash},
            "marker": {"symbol": style.symbol, "size": 7, "color": style.colour},
            "hovertemplate": f"{escape(label)}<br>%{{x:.4~g}}: %{{y:.4~g}}%{{customdata}}<extra></extra>",
            "customdata": [_deviation(value, scale) for value in values],
        }
        self.add(label, style, trace, *_band(style, x, values, scale))

    def figure(self, *, name: str, title: str, alt: str, layout: Mapping[str, Any], **more: Any) -> Figure:
        """Return the figure."""
        return Figure(
            name=slug(name),
            title=title,
            alt=alt,
            traces=tuple(self._traces),
            layout=layout,
            series=tuple(self._series),
            **more,
        )


#: Up to how many points a line has marks.
_MARKED = 26


def _look(style: Style, lines: bool) -> dict[str, str]:
    return {"colour": style.colour, "symbol": style.symbol, "dash": style.dash if lines else ""}


def _band(style: Style, x: Sequence[float], values: Sequence[Value], scale: float) -> list[dict[str, Any]]:
    if all(value.spread is None for value in values) or len(x) < 2:
        return []
    low = [scale * (value.mean - (value.spread or 0.0)) for value in values]
    high = [scale * (value.mean + (value.spread or 0.0)) for value in values]
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "x": rounded([*x, *reversed(x)]),
            "y": rounded([*high, *reversed(low)]),
            "fill": "toself",
            "fillcolor": f"{style.colour}/0.13",
            "line": {"width": 0, "color": style.colour},
            "hoverinfo": "skip",
        }
    ]


def _deviation(value: Value, scale: float) -> str:
    spread = "" if value.spread is None else f" ± {scale * value.spread:.3g}"
    return f"{spread} (n = {value.count})" if value.count > 1 else spread


def over_repeats(curves: Iterable[tuple[Sequence[Any], Sequence[Any]]]) -> tuple[list[float], list[Value]]:
    """Join curves of repeats: at every position the mean of those that have a number there.

    >>> x, y = over_repeats([([0, 1], [1.0, 2.0]), ([0, 1], [3.0, None])])
    >>> x, [value.mean for value in y]
    ([0.0, 1.0], [2.0, 2.0])
    """
    found: dict[float, list[float]] = {}
    for x, y in curves:
        for position, value in zip(x, y, strict=False):
            if is_number(position) and is_number(value):
                found.setdefault(round(float(position), 9), []).append(float(value))
    pairs = [(position, value_of(found[position])) for position in sorted(found)]
    joined = [(position, value) for position, value in pairs if value is not None]
    return [position for position, _ in joined], [value for _, value in joined]


def is_number(value: object) -> bool:
    """Say whether something is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def axis(title: str, **more: Any) -> dict[str, Any]:
    """Return an axis with a title."""
    return {"title": {"text": escape(title)}, **more}


def escape(text: object) -> str:
    """Write words from records so that Plotly takes nothing in them for markup or for a placeholder.

    >>> escape("<b>a & b</b>")
    '&lt;b&gt;a &amp; b&lt;/b&gt;'
    """
    return html.escape(str(text), quote=False).replace("%{", "%&#123;").replace("$", "&#36;")


def rounded(values: Iterable[float | None]) -> list[float | None]:
    """Round to five significant digits: more cannot be seen, and takes room."""
    return [None if value is None or not math.isfinite(value) else float(f"{value:.5g}") for value in values]


def slug(text: str) -> str:
    """Make a file's name of some words.

    >>> slug("Barrier: CIFAR-10, vgg11?width=0.25")
    'barrier-cifar-10-vgg11-width-0-25'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:80] or "figure"


def numbered(figures: Sequence[Figure]) -> list[Figure]:
    """Make names unique by a number behind those that are not."""
    seen: dict[str, int] = {}
    found: list[Figure] = []
    for figure in figures:
        count = seen[figure.name] = seen.get(figure.name, 0) + 1
        found.append(figure if count == 1 else replace(figure, name=f"{figure.name}-{count}"))
    return found
