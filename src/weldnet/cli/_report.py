"""The report of a fusion as HTML, JSON or Markdown."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weldnet.fusion import Report, Row

__all__ = ["REPORT_SUFFIXES", "render"]


def render(report: Report, suffix: str) -> str:
    """Return the report in the format of a file suffix, one of `REPORT_SUFFIXES`."""
    return _FORMATS[suffix](report)


def _html(report: Report) -> str:
    from rich.console import Console

    console = Console(record=True, file=io.StringIO(), width=120)
    console.print(report.table())
    for line in report.lines():
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    body = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
    title = html.escape(f"weldnet: {' + '.join(row.name for row in report.rows if row.role == 'parent')}")
    style = "body{margin:2rem}pre{font-family:ui-monospace,Menlo,Consolas,monospace;line-height:1.3;overflow-x:auto}"
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{style}</style></head>\n<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )


def _json(report: Report) -> str:
    return json.dumps(report.to_dict(), indent=1) + "\n"


def _markdown(report: Report) -> str:
    scores = list(dict.fromkeys(key for row in report.rows for key in row.scores))
    headings = ["network", "role", *(key.replace("_", " ") for key in scores), "weight", "moved", "equivalence error"]
    rows = [headings, ["---"] * len(headings), *([_escape(cell) for cell in _cells(r, scores)] for r in report.rows)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return table + "\n\n" + "\n".join(f"- {line}" for line in report.lines()) + "\n"


def _cells(row: Row, scores: list[str]) -> list[str]:
    from weldnet.fusion import score_text

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    measured = [score_text(key, row.scores.get(key)) for key in scores]
    return [
        row.name,
        row.role,
        *measured,
        number(row.weight, ".3g"),
        number(row.moved, ".1%"),
        number(row.equivalence, ".1e"),
    ]


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")


_FORMATS: dict[str, Callable[[Report], str]] = {".html": _html, ".json": _json, ".md": _markdown}
REPORT_SUFFIXES = tuple(_FORMATS)
