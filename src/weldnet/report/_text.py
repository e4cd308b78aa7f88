"""A page as Markdown for papers, as tidy CSV, and as JSON."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from typing import Any

from weldnet.report._page import Cell, Facts, Gallery, Page, Section, Stats, Table

__all__ = ["to_csv", "to_dict", "to_markdown"]


def to_markdown(page: Page) -> str:
    """Write a page's tables, notes and provenance as Markdown; of figures their words."""
    parts = [f"# {_inline(page.title)}", _inline(page.subtitle)]
    parts += [f"> {_inline(text)}" for text in page.warnings]
    for index, section in enumerate(page.sections):
        parts += _section(section)
        if index == 0 and page.notes:
            parts.append("\n".join(f"- {_inline(note)}" for note in page.notes))
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(section: Section) -> list[str]:
    parts = [f"## {section.title}", _inline(section.intro)]
    for block in section.blocks:
        if isinstance(block, Table):
            parts += [f"### {_inline(block.title)}", _inline(block.caption), markdown_table(block), _notes(block)]
        elif isinstance(block, Stats):
            parts.append(
                "\n".join(f"- {_inline(n)}: {_inline(c.plain)} {_inline(r)}".rstrip() for n, c, r in block.entries)
            )
        elif isinstance(block, Facts):
            parts.append("\n".join(f"- {_inline(f'{n}: {text}' if n else text)}" for n, text in block.entries))
        else:
            parts += _figures(block)
    return parts


def _figures(block: Gallery) -> list[str]:
    return ["\n".join(f"- {_inline(f'{figure.title}: {figure.alt}')}" for figure in block.figures)]


def markdown_table(table: Table) -> str:
    """Write one table: the best in bold, published columns named so.

    >>> cells = (Cell(text="GAMF"), Cell(text="98.10", spread="0.20", best=True))
    >>> from weldnet.report._page import Column, Row
    >>> columns = (Column(label="method"), Column(label="measured", group="2 networks"))
    >>> print(markdown_table(Table(title="t", columns=columns, rows=(Row(cells=cells),))))
    | method | 2 networks: measured |
    | :-- | --: |
    | GAMF | **98.10** ± 0.20 |
    """
    heading = [f"{column.group}: {column.label}" if column.group else column.label for column in table.columns]
    rule = [":--" if index < table.words else "--:" for index in range(len(table.columns))]
    body = [[_cell(cell) for cell in row.cells] for row in table.rows]
    return "\n".join(f"| {' | '.join(map(_pipe, row))} |" for row in [[_inline(h) for h in heading], rule, *body])


def _cell(cell: Cell) -> str:
    text = _inline(cell.text)
    spread = f" ± {cell.spread}" if cell.spread else ""
    return (f"**{text}**" if cell.best and text else text) + spread + (f" [{_inline(cell.mark)}]" if cell.mark else "")


def _notes(table: Table) -> str:
    return "\n".join(f"- {f'[{sign}] ' if sign else ''}{_inline(text)}" for sign, text in table.notes)


def _inline(text: str) -> str:
    """Write words on one line, without what Markdown or HTML would take for a command."""
    found = " ".join(text.split())
    for sign in "\\`*_<>[]":
        found = found.replace(sign, f"\\{sign}")
    return found


def _pipe(text: str) -> str:
    return text.replace("|", "\\|")


def to_csv(page: Page) -> str:
    """Write every mean as a line, measured and published ones told apart by the column ``origin``."""
    words = list(dict.fromkeys(word for entry in page.numbers for word in entry))
    last = ("metric", "mean", "deviation", "n", "source")
    columns = [*(word for word in words if word not in last), *last]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value is None else value for key, value in entry.items()} for entry in page.numbers)
    return text.getvalue()


def to_dict(page: Page) -> dict[str, Any]:
    """Return a page as plain data: numbers, tables, notes and provenance; of figures names, titles and words."""
    return {
        "title": page.title,
        "subtitle": page.subtitle,
        "warnings": list(page.warnings),
        "notes": list(page.notes),
        "numbers": [dict(entry) for entry in page.numbers],
        "tables": [asdict(table) for table in page.tables],
        "figures": [{"name": f.name, "title": f.title, "caption": f.caption, "alt": f.alt} for f in page.figures],
        "provenance": dict(page.provenance),
    }
