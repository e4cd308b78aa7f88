"""A page as one HTML file that needs nothing else: no network, no fonts, no style sheets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from itertools import groupby
from typing import Any

from weldnet.errors import UsageError
from weldnet.report._colours import PALETTES, assign
from weldnet.report._page import Page, Table

__all__ = ["BASE", "INSTALL", "require_extra", "to_html"]

INSTALL = "pip install 'weldnet[report]'"

BASE: Mapping[str, Any] = {
    "font": {"size": 12, "color": "@ink"},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "margin": {"l": 48, "r": 12, "t": 10, "b": 40},
    "hovermode": "closest",
    "hoverlabel": {
        "bgcolor": "@paper",
        "bordercolor": "@muted",
        "font": {"color": "@ink", "size": 12},
        "align": "left",
    },
    "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "@muted", "activecolor": "@ink"},
    "xaxis": {
        "showgrid": False,
        "zeroline": False,
        "showline": True,
        "linecolor": "@muted",
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": "@muted",
        "tickfont": {"color": "@muted"},
        "title": {"font": {"size": 12, "color": "@muted"}, "standoff": 8},
        "automargin": True,
    },
    "yaxis": {
        "gridcolor": "@line",
        "zeroline": False,
        "zerolinecolor": "@muted",
        "tickfont": {"color": "@muted"},
        "title": {"font": {"size": 12, "color": "@muted"}, "standoff": 8},
        "automargin": True,
    },
}
"""What the layouts of all figures share; colours are tokens."""


def to_html(page: Page) -> str:
    """Write a page as HTML.

    Everything that comes from records is escaped, and a content security policy forbids the page to load anything.

    Raises:
        UsageError: jinja2 or plotly is not installed.
    """
    require_extra()
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    keys = [cell.key for table in page.tables for row in table.rows for cell in row.cells if cell.key]
    entries = {key: entry.replace(" ", "-") for key, entry in assign(keys).items()}
    return environment.from_string(_file("page.html.j2")).render(
        page=page,
        style=Markup(_variables() + _file("page.css")),
        script=Markup(_file("page.js")),
        plotly=Markup(_plotly() if page.figures else ""),
        figures=Markup(_figures(page)),
        kind_of=lambda block: type(block).__name__,
        colour_of=entries.__getitem__,
        widths_of=_widths,
        groups_of=_groups,
        starts_group=_starts_group,
    )


def require_extra() -> None:
    """Refuse at once what needs packages that are not there.

    Raises:
        UsageError: naming them and how to install them.
    """
    from importlib.util import find_spec

    missing = [name for name in ("jinja2", "plotly") if find_spec(name) is None]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise UsageError(
            f"a page of HTML needs {' and '.join(missing)}, which {are} not installed; {INSTALL}, or write .md"
        )


def _file(name: str) -> str:
    return (resources.files("weldnet.report") / name).read_text(encoding="utf-8")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs().replace("</script", "<\\/script")


def _figures(page: Page) -> str:
    """Write the figures as JSON that cannot end its script."""
    figures = {
        figure.name: {
            "traces": figure.traces,
            "layout": figure.layout,
            "series": [asdict(series) for series in figure.series],
            "height": figure.height,
        }
        for figure in page.figures
    }
    text = json.dumps({"palettes": PALETTES, "base": BASE, "figures": figures}, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# -- style -----------------------------------------------------------------------------------------

_SHADES: Mapping[str, Mapping[str, str]] = {
    "light": {"accent": "#0b5cad", "tint": "#f4f5f7", "hover": "#eef3f9", "warn": "#c2500c"},
    "dark": {"accent": "#6fb1f5", "tint": "#1d2228", "hover": "#1a222c", "warn": "#f79b5f"},
}


def _variables() -> str:
    """Write the palettes as variables: by what the system prefers, by the switch, and light in print."""
    light, dark = (_declarations(theme) for theme in ("light", "dark"))
    return (
        f":root{{color-scheme:light;{light}}}\n"
        f"@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{color-scheme:dark;{dark}}}}}\n"
        f":root[data-theme=dark]{{color-scheme:dark;{dark}}}\n"
        f"@media print{{:root,:root:not([data-theme=light]),:root[data-theme=dark]{{color-scheme:light;{light}}}}}\n"
    )


def _declarations(theme: str) -> str:
    roles = {name: PALETTES[theme][name] for name in ("ink", "muted", "line", "paper")}
    methods = {f"c-{name.replace(' ', '-')}": colour for name, colour in PALETTES[theme].items()}
    return "".join(f"--{name}:{value};" for name, value in {**roles, **_SHADES[theme], **methods}.items())


# -- tables ----------------------------------------------------------------------------------------


def _widths(table: Table) -> list[dict[str, int]]:
    """Return how many letters texts, deviations and marks of each column take, so that numbers stand in line."""
    found: list[dict[str, int]] = []
    for column in zip(*(row.cells for row in table.rows), strict=True):
        texts = {
            "letters": [c.text for c in column],
            "spread": [c.spread for c in column],
            "mark": [c.mark for c in column],
        }
        found.append({name: max(map(len, entries)) for name, entries in texts.items()})
    return found


def _groups(table: Table) -> Sequence[Mapping[str, Any]]:
    return [
        {"label": label, "span": len(list(run))} for label, run in groupby(column.group for column in table.columns)
    ]


def _starts_group(table: Table, index: int) -> bool:
    columns = table.columns
    return bool(columns[index].group) and (index == 0 or columns[index - 1].group != columns[index].group)
