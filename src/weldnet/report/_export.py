"""Figures as files, for papers and slides."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from weldnet.errors import RecordError, UsageError
from weldnet.report._colours import resolve
from weldnet.report._html import BASE, INSTALL
from weldnet.report._page import Figure, Page
from weldnet.report._plot import escape

__all__ = ["FORMATS", "export_figures", "require_exporter"]

FORMATS = ("svg", "png", "pdf")
"""What figures can be written as."""
_WIDTH = 640
_TITLE, _LEGEND_LINE = 46, 22
#: Of pixels, so that a picture is sharp in print.
_SCALE = 3


def export_figures(page: Page, folder: str | os.PathLike[str], formats: Collection[str] = ("svg", "png")) -> list[Path]:
    """Write every figure of a page to a folder, in the colours of a light page, on white.

    Args:
        page: whose figures.
        folder: made if it is missing; files of the same names are replaced.
        formats: some of :data:`FORMATS`.

    Returns:
        The files.

    Raises:
        UsageError: plotly, kaleido or a Chrome for it is missing, or a format is unknown.
        CheckpointError: the folder cannot be written.
        RecordError: a figure cannot be drawn.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise UsageError(f"figures cannot be written as {unknown[0]!r}; choose from {', '.join(FORMATS)}")
    require_exporter()
    from weldnet.checkpoints import atomic_path, check_writable

    targets = [(figure, Path(folder) / f"{figure.name}.{name}", name) for figure in page.figures for name in formats]
    for _, path, _ in targets[:1]:
        check_writable(path)
    drawn = _drawn([(figure, name) for figure, _, name in targets]) if targets else []
    for (_, path, _), data in zip(targets, drawn, strict=True):
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)
    return [path for _, path, _ in targets]


def require_exporter() -> None:
    """Refuse at once what needs packages that are not there.

    Raises:
        UsageError: naming them and how to install them.
    """
    if find_spec("plotly") is None:
        raise UsageError(f"exporting figures needs plotly, which is not installed; {INSTALL}")
    if find_spec("kaleido") is None:
        raise UsageError("exporting figures needs kaleido, which is not installed; pip install 'kaleido>=1'")


def _drawn(wanted: Sequence[tuple[Figure, str]]) -> list[bytes]:
    """Draw figures, all with one browser."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    import kaleido

    async def draw() -> list[bytes]:
        async with kaleido.Kaleido() as browser:
            return [await browser.calc_fig(_whole(figure), _options(figure, name)) for figure, name in wanted]

    try:
        with ThreadPoolExecutor(1) as thread:  # of its own: in a notebook an event loop runs already in this one
            return thread.submit(lambda: asyncio.run(draw())).result()
    except Exception as error:  # what a browser does may raise anything
        if "chrome" in type(error).__name__.lower():
            raise UsageError(
                "exporting figures needs Chrome or Chromium, and there is none; install one, or run kaleido_get_chrome"
            ) from error
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise RecordError(f"the figures could not be drawn: {why}; check that Chrome or Chromium starts") from error


def _options(figure: Figure, name: str) -> Any:
    return {"format": name, "width": _WIDTH, "height": _height(figure), "scale": _SCALE if name == "png" else 1}


def _height(figure: Figure) -> int:
    return figure.height + _TITLE + _LEGEND_LINE * _legend_lines(figure)


def _legend_lines(figure: Figure) -> int:
    """Say how many lines a legend takes, going by its letters."""
    if len(figure.series) < 2:
        return 0
    return -(-sum(55 + 7 * len(series.label) for series in figure.series) // (_WIDTH - 40))


def _whole(figure: Figure) -> dict[str, Any]:
    """Return a figure with title and legend of its own: no page is around it."""
    layout = _merged(BASE, figure.layout)
    margin = layout["margin"]
    lines = _legend_lines(figure)
    layout |= {
        "paper_bgcolor": "#ffffff",
        "title": {"text": _title(figure), "x": 0, "y": 1, "yanchor": "top", "xref": "container", "yref": "container"},
        "showlegend": lines > 0,
        "legend": {"orientation": "h", "y": 0, "yanchor": "bottom", "x": 0, "xref": "container", "yref": "container"},
        "margin": {**margin, "t": margin["t"] + _TITLE, "b": margin["b"] + 8 + _LEGEND_LINE * lines},
        "width": _WIDTH,
        "height": _height(figure),
    }
    layout["title"] |= {"font": {"size": 15}, "pad": {"l": 12, "t": 26 if figure.caption else 14}}
    layout["font"] = {**layout["font"], "family": "Helvetica, Arial, sans-serif"}
    return resolve({"data": _named(figure), "layout": layout})


def _named(figure: Figure) -> list[dict[str, Any]]:
    """Return the traces with the names of the legend's entries, each at the first of its traces."""
    names = {series.traces[0]: series.label for series in figure.series if series.traces}
    return [
        {**trace, "showlegend": index in names, **({"name": escape(names[index])} if index in names else {})}
        for index, trace in enumerate(figure.traces)
    ]


def _title(figure: Figure) -> str:
    more = f"<br><span style='font-size:11px'>{escape(figure.caption)}</span>" if figure.caption else ""
    return escape(figure.title) + more


def _merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for key, value in more.items():
        before = found.get(key)
        found[key] = _merged(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return found
