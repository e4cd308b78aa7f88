"""A page as data: sections of tables and figures, which HTML, Markdown, CSV and JSON write each in their way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

__all__ = [
    "Block",
    "Cell",
    "Column",
    "Facts",
    "Figure",
    "Gallery",
    "Page",
    "Row",
    "Section",
    "Series",
    "Stats",
    "Table",
]


@final
@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table.

    Args:
        label: its heading.
        group: a heading that neighbouring columns share.
        origin: ``measured`` by us, or ``published``; empty for words.
        hint: what the heading means, for who asks.
    """

    label: str
    group: str = ""
    origin: str = ""
    hint: str = ""


@final
@dataclass(frozen=True, kw_only=True)
class Cell:
    """What stands at one place of a table.

    Args:
        text: the value, as it is read.
        spread: its deviation, as it is read; empty if there is none.
        number: what to sort by; None sorts last, words by their text.
        best: whether it is the best of its column.
        note: more about it, such as how many values it is a mean of.
        mark: signs of footnotes.
        key: what it is about, to give it its colour: a method.
    """

    text: str = ""
    spread: str = ""
    number: float | None = None
    best: bool = False
    note: str = ""
    mark: str = ""
    key: str = ""

    @property
    def plain(self) -> str:
        """The cell as plain text.

        >>> Cell(text="98.10", spread="0.20", mark="a").plain
        '98.10 ± 0.20 [a]'
        """
        spread = f" ± {self.spread}" if self.spread else ""
        return f"{self.text}{spread}" + (f" [{self.mark}]" if self.mark else "")


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table; ``reference`` for what does not compete: parents, their ensemble."""

    cells: tuple[Cell, ...]
    reference: bool = False


@final
@dataclass(frozen=True, kw_only=True)
class Table:
    """A table.

    Args:
        title: what it shows.
        caption: how to read it.
        columns: the first ``words`` of them hold words, the others numbers.
        rows: one cell for each column.
        words: how many columns hold words.
        notes: footnotes, each with its sign.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    words: int = 1
    caption: str = ""
    notes: tuple[tuple[str, str], ...] = ()


@final
@dataclass(frozen=True, kw_only=True)
class Series:
    """An entry of a figure's legend.

    Args:
        label: its words.
        colour: a colour's token, see `_colours`.
        symbol: of its marks.
        dash: of its line; empty for none.
        traces: which of the figure's traces belong to it.
    """

    label: str
    colour: str
    symbol: str = "circle"
    dash: str = ""
    traces: tuple[int, ...] = ()


@final
@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure.

    Args:
        name: of its file, if it is exported; letters, digits and dashes, unique in the page.
        title: what it shows.
        caption: how to read it.
        alt: what is to be seen, in words.
        traces: of Plotly; colours are tokens.
        layout: of Plotly, beyond what all figures share.
        series: the legend; empty for none.
        height: in pixels.
    """

    name: str
    title: str
    alt: str
    traces: tuple[Mapping[str, Any], ...]
    layout: Mapping[str, Any]
    caption: str = ""
    series: tuple[Series, ...] = ()
    height: int = 320


@final
@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Figures side by side, as many as there is room for; ``small`` ones are square and as narrow as a phone's half."""

    figures: tuple[Figure, ...]
    title: str = ""
    caption: str = ""
    small: bool = False


@final
@dataclass(frozen=True, kw_only=True)
class Facts:
    """Names and what they are."""

    entries: tuple[tuple[str, str], ...]
    title: str = ""


@final
@dataclass(frozen=True, kw_only=True)
class Stats:
    """A few large numbers: label, value and a remark each."""

    entries: tuple[tuple[str, Cell, str], ...]
    title: str = ""


Block = Table | Gallery | Facts | Stats


@final
@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page under a heading."""

    name: str
    title: str
    blocks: tuple[Block, ...]
    intro: str = ""


@final
@dataclass(frozen=True, kw_only=True)
class Page:
    """All that a report shows.

    Args:
        title: of the study.
        subtitle: one line on what was measured.
        sections: only those for which there are records.
        warnings: what a reader must know first.
        notes: what else to know, in full sentences.
        numbers: every mean as plain data, measured and published apart.
        provenance: where the numbers come from, as plain data.
    """

    title: str
    sections: tuple[Section, ...]
    subtitle: str = ""
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    numbers: tuple[Mapping[str, Any], ...] = ()
    provenance: Mapping[str, Any]

    @property
    def figures(self) -> tuple[Figure, ...]:
        """All figures, in their order."""
        blocks = [block for section in self.sections for block in section.blocks]
        return tuple(figure for block in blocks if isinstance(block, Gallery) for figure in block.figures)

    @property
    def tables(self) -> tuple[Table, ...]:
        """All tables, in their order."""
        return tuple(block for section in self.sections for block in section.blocks if isinstance(block, Table))
