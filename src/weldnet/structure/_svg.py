"""The structure as a picture of its own, without any drawing program: layers as rows, spaces as lanes."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final
from xml.sax.saxutils import escape

from weldnet.structure._draw import Mark, Row, clean, lay_out, space_colours
from weldnet.structure._spec import Space, Structure
from weldnet.structure._tree import headline, size_words

__all__ = ["draw_svg"]

FONT, SMALL, TITLE = 12, 11, 16
#: Width of a character of a fixed-width font, in its size; a little more than that of the common ones.
ADVANCE = 0.62
LINE, ROW, LANE, MARGIN, RADIUS = 16, 24, 26, 16, 8
LONGEST_NAME, LONGEST_NOTE = 64, 96
#: Said of nearly every convolution, and of no interest in a picture.
UNSAID = frozenset({"kernel position"})

_LEGEND = (
    "Rows are layers, from top to bottom in the order of the forward pass; a coloured lane is a space.",
    "A dot is a layer with a tensor in which the space lies; the number is the axis (hover for the tensors).",
    "A frame holds a space of blocks and the spaces nested in it; frozen: what may not be renumbered, and why.",
)
_STYLE = """
text { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: 12px; fill: #1b1f24 }
.title { font-size: 16px; font-weight: bold }
.dim { font-size: 11px; fill: #57606a }
.axis { font-size: 10px; font-weight: bold; fill: #ffffff; text-anchor: middle }
.paper { fill: #ffffff }
.stripe { fill: #f3f5f7 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6e9ec }
  .dim { fill: #a2acb6 }
  .axis { fill: #ffffff }
  .paper { fill: #14171a }
  .stripe { fill: #1d2126 }
}
"""


def draw_svg(structure: Structure, order: Sequence[str] = (), *, title: str = "structure") -> str:
    """Draw the spaces as coloured lanes over the layers, as SVG; nothing else is needed to see it than a browser.

    Args:
        structure: what to draw.
        order: modules in the order of the forward pass, from :func:`layer_order`.
        title: of the drawing.
    """
    canvas = _Canvas(structure, lay_out(structure, order), title)
    body = "\n".join(canvas.parts())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{canvas.width}" height="{canvas.height}" '
        f'viewBox="0 0 {canvas.width} {canvas.height}" role="img">\n<title>{_text(title)}</title>\n'
        f"<style>{_STYLE}</style>\n{body}\n</svg>\n"
    )


@final
@dataclass(frozen=True)
class _Lane:
    """Where a space is drawn: its column, and its first and last row with what is nested in it."""

    column: int
    first: int
    last: int
    columns: int


class _Canvas:
    """Knows where everything lies; gives the parts of the drawing from back to front."""

    def __init__(self, structure: Structure, rows: Sequence[Row], title: str) -> None:
        self._structure, self._rows, self._title = structure, rows, title
        self._colours = space_colours(structure)
        self._lanes = _assign_lanes(structure, rows)
        self._notes = [self._notes_of(number) for number in range(len(rows))]
        self._top = [MARGIN + TITLE + 2 * LINE]
        for notes in self._notes:
            self._top.append(self._top[-1] + max(ROW, LINE * len(notes) + ROW - LINE))
        self._names = [_shorten(row.module or "(the model itself)", LONGEST_NAME) for row in rows]
        self._tensors = [_shorten("; ".join(row.tensors), LONGEST_NAME) for row in rows]
        self._columns = max((lane.column + lane.columns for lane in self._lanes.values()), default=0)
        self._shapes_at = MARGIN + _longest(self._names, FONT) + 12
        self._lanes_at = self._shapes_at + _longest(self._tensors, SMALL) + 16
        self._notes_at = self._lanes_at + self._columns * LANE + 12
        words = [text for notes in self._notes for text, _ in notes]
        legend = _longest([*_LEGEND, headline(structure)], SMALL)
        heading = _longest([title], TITLE)
        self.width = MARGIN + max(self._notes_at + MARGIN + _longest(words, SMALL), MARGIN + max(legend, heading))
        self.height = self._top[-1] + LINE * (len(_LEGEND) + 1) + MARGIN

    def parts(self) -> Iterator[str]:
        """Yield the elements of the drawing, from back to front."""
        yield f'<rect class="paper" width="{self.width}" height="{self.height}"/>'
        for number in range(0, len(self._rows), 2):
            top, bottom = self._top[number], self._top[number + 1]
            yield f'<rect class="stripe" y="{top}" width="{self.width}" height="{bottom - top}"/>'
        yield _label(MARGIN, MARGIN + TITLE, self._title, "title")
        yield _label(MARGIN, MARGIN + TITLE + LINE, headline(self._structure), "dim")
        for root in self._structure.roots:
            yield from self._frames(root, 0)
        for name in self._lanes:
            yield from self._line(name)
        for number, row in enumerate(self._rows):
            yield from self._row(number, row)
        for number, line in enumerate(_LEGEND):
            yield _label(MARGIN, self._top[-1] + LINE * (number + 2), line, "dim")

    def _frames(self, space: Space, depth: int) -> Iterator[str]:
        children = self._structure.children(space.name)
        lane = self._lanes.get(space.name)
        if not children or lane is None:
            return
        inset = 1 + 2 * depth
        x, width = self._lanes_at + lane.column * LANE + inset, lane.columns * LANE - 2 * inset
        y = self._top[lane.first] + inset
        height = self._top[lane.last] + ROW - inset - y
        colour = self._colours[space.name]
        yield (
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="9" fill="{colour}" fill-opacity="0.14" '
            f'stroke="{colour}"><title>{_text(self._name(space))}</title></rect>'
        )
        for child in children:
            yield from self._frames(child, depth + 1)

    def _line(self, name: str) -> Iterator[str]:
        numbers = [number for number, row in enumerate(self._rows) if any(mark.space == name for mark in row.marks)]
        if numbers:
            x = self._centre(name)
            first, last = self._middle(numbers[0]), self._middle(numbers[-1])
            yield f'<path d="M{x} {first}V{last}" stroke="{self._colours[name]}" stroke-width="3"/>'

    def _row(self, number: int, row: Row) -> Iterator[str]:
        base = self._middle(number) + 4
        yield _label(MARGIN, base, self._names[number], "", hint=row.module)
        yield _label(self._shapes_at, base, self._tensors[number], "dim", hint="; ".join(row.tensors))
        for mark in row.marks:
            yield self._dot(number, mark)
        for line, (text, space) in enumerate(self._notes[number]):
            y = base + line * LINE
            if space is not None:
                colour = self._colours[space]
                yield f'<rect x="{self._notes_at}" y="{y - 9}" width="10" height="10" rx="2" fill="{colour}"/>'
            yield _label(self._notes_at + 16, y, text, "dim")

    def _dot(self, number: int, mark: Mark) -> str:
        x, y = self._centre(mark.space), self._middle(number)
        axes = mark.axes if len(mark.axes) <= 3 else "*"
        wide = max(RADIUS, 3.7 * len(axes))
        hint = "\n".join((self._name(self._structure.space(mark.space)), *mark.words))
        return (
            f'<g><title>{_text(hint)}</title><rect x="{x - wide:g}" y="{y - RADIUS}" width="{2 * wide:g}" '
            f'height="{2 * RADIUS}" rx="{RADIUS}" fill="{self._colours[mark.space]}"/>'
            f'<text class="axis" x="{x}" y="{y + 3.5:g}">{axes}</text></g>'
        )

    def _notes_of(self, number: int) -> list[tuple[str, str | None]]:
        """Say which spaces begin in a row, and what is frozen in it."""
        begin = [space for space in self._structure.spaces if self._begins(space, number)]
        notes: list[tuple[str, str | None]] = [
            (_shorten(self._name(space), LONGEST_NOTE), space.name) for space in begin
        ]
        frozen = [reason for reason in self._rows[number].frozen if reason not in UNSAID]
        if frozen:
            notes.append((_shorten(f"frozen: {'; '.join(frozen)}", LONGEST_NOTE), None))
        if self._rows[number].tied:
            notes.append((_shorten(f"tied: {'; '.join(self._rows[number].tied)}", LONGEST_NOTE), None))
        return notes

    def _begins(self, space: Space, number: int) -> bool:
        lane = self._lanes.get(space.name)
        return lane is not None and lane.first == number

    def _name(self, space: Space) -> str:
        return f"{space.name}: {size_words(space, bool(self._structure.children(space.name)))}"

    def _centre(self, space: str) -> int:
        return self._lanes_at + self._lanes[space].column * LANE + LANE // 2

    def _middle(self, number: int) -> int:
        return self._top[number] + ROW // 2


# -- which lane is whose -----------------------------------------------------------------------------


def _assign_lanes(structure: Structure, rows: Sequence[Row]) -> dict[str, _Lane]:
    """Give every space a column; spaces that do not overlap may share one, and a tree's columns lie side by side."""
    touched: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        for mark in row.marks:
            touched.setdefault(mark.space, []).append(number)
    spans = {root.name: _span(structure, root, touched) for root in structure.roots}
    lanes: dict[str, _Lane] = {}
    busy_until: list[int] = []
    for root in sorted((r for r in structure.roots if spans[r.name]), key=lambda r: spans[r.name]):
        first, last = spans[root.name]
        need = _columns(structure, root, touched)
        start = next(c for c in range(len(busy_until) + 1) if all(end < first for end in busy_until[c : c + need]))
        busy_until += [-1] * (start + need - len(busy_until))
        busy_until[start : start + need] = [last] * need
        _place(structure, root, touched, start, lanes)
    return lanes


def _place(
    structure: Structure, space: Space, touched: dict[str, list[int]], column: int, lanes: dict[str, _Lane]
) -> None:
    span = _span(structure, space, touched)
    if not span:
        return
    lanes[space.name] = _Lane(column, span[0], span[1], _columns(structure, space, touched))
    column += space.name in touched
    for child in structure.children(space.name):
        _place(structure, child, touched, column, lanes)
        column += _columns(structure, child, touched)


def _columns(structure: Structure, space: Space, touched: dict[str, list[int]]) -> int:
    return sum(each.name in touched for each in structure.tree(space.name))


def _span(structure: Structure, space: Space, touched: dict[str, list[int]]) -> tuple[int, ...]:
    """Return the first and the last row of a space with what is nested in it; nothing if it has none."""
    numbers = [number for each in structure.tree(space.name) for number in touched.get(each.name, ())]
    return (min(numbers), max(numbers)) if numbers else ()


# -- text --------------------------------------------------------------------------------------------


def _label(x: int, y: int, text: str, kind: str, *, hint: str = "") -> str:
    shown = f"<title>{_text(hint)}</title>" if hint and hint != text else ""
    style = f' class="{kind}"' if kind else ""
    return f'<text{style} x="{x}" y="{y}" xml:space="preserve">{shown}{_text(text)}</text>'


def _text(text: str) -> str:
    return "\n".join(escape(clean(line)) for line in text.split("\n"))


def _shorten(text: str, limit: int) -> str:
    """Cut a long text in its middle: both ends tell names apart."""
    half = (limit - 1) // 2
    return text if len(text) <= limit else f"{text[:half]}…{text[-half:]}"


def _longest(texts: Sequence[str], size: int) -> int:
    return round(max(map(_cells, texts), default=0) * size * ADVANCE)


def _cells(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
