"""How good an alignment is, space by space."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
from torch import Tensor

from weldnet.alignment._method import Alignment
from weldnet.alignment._transport import transport
from weldnet.errors import AlignmentError
from weldnet.structure import Place, Space, Structure, unit_rows

__all__ = ["Diagnosis", "SpaceRow", "carry_all", "diagnose_states"]

States = Mapping[str, Mapping[str, Tensor]]


@final
@dataclass(frozen=True)
class SpaceRow:
    """How well the units of one space were matched.

    A unit's row is what all tensors hold for it, each tensor scaled to mean square 1; what is nested in a unit belongs
    to it.

    Args:
        space: its name.
        units: their number.
        moved: share of the units that change their number; the mean over all networks but the first.
        quality: mean cosine between the rows of matched units, over units and pairs of networks; 1 for equal ones.
        unaligned: the same between units of equal number; None if the widths differ.
        cost: mean square distance between the rows of matched units, relative to that of unrelated ones: 0 for equal,
            1 for unrelated.
    """

    space: str
    units: int
    moved: float
    quality: float
    unaligned: float | None
    cost: float


@final
@dataclass(frozen=True)
class Diagnosis:
    """An alignment space by space; ``print`` shows the table.

    Args:
        rows: one for each space, in the order of the structure.
    """

    rows: tuple[SpaceRow, ...]

    def to_dict(self) -> list[dict[str, Any]]:
        """Return the rows as plain data."""
        return [asdict(row) for row in self.rows]

    def table(self) -> Any:
        """Return the table as a ``rich`` renderable."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, title="spaces", title_justify="left")
        table.add_column("space")
        for heading in ("units", "moved", "match quality", "unaligned", "cost"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            unaligned = "" if row.unaligned is None else f"{row.unaligned:.4f}"
            cells = f"{row.moved:.1%}", f"{row.quality:.4f}", unaligned, f"{row.cost:.4f}"
            table.add_row(row.space, str(row.units), *cells)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=110, color_system=None)
        console.print(self.table(), highlight=False, markup=False)
        assert isinstance(console.file, io.StringIO)
        return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().splitlines())


def diagnose_states(alignment: Alignment, states: States, structure: Structure, moved: States) -> Diagnosis:
    """Compare networks that were carried already; as `weldnet.diagnose`.

    Args:
        alignment: who went where.
        states: the networks' tensors as they were.
        structure: where the units lie in the universe.
        moved: the networks' tensors in the universe.
    """
    names = list(alignment.couplings)
    first = states[names[0]]
    equal = all(tuple(states[n][t].shape) == tuple(first[t].shape) for n in names for t in structure.shapes)
    rows: list[SpaceRow] = []
    for space in structure.spaces:
        grams = _grams(space, structure, [moved[name] for name in names]).cpu()
        before = _grams(space, structure, [states[name] for name in names]).cpu() if equal else None
        shares = [alignment[name][space.name].moved for name in names[1:] if space.name in alignment[name]]
        rows.append(
            SpaceRow(
                space.name,
                space.size,
                sum(shares) / len(shares) if shares else 0.0,
                _cosine(grams),
                None if before is None else _cosine(before),
                _cost(grams),
            )
        )
    return Diagnosis(tuple(rows))


def carry_all(
    alignment: Alignment, states: States, structure: Structure, structures: Mapping[str, Structure]
) -> dict[str, dict[str, Tensor]]:
    """Carry every network of an alignment to the universe; ``structures`` are those of other widths.

    Raises:
        AlignmentError: a network is missing, or does not fit.
    """
    missing = [name for name in alignment.couplings if name not in states]
    if missing or len(alignment.couplings) < 2:
        known = ", ".join(states)
        raise AlignmentError(f"the alignment is of {', '.join(alignment.couplings)}, the networks are {known}")
    return {
        name: transport(states[name], structures.get(name, structure), alignment[name], structure)
        for name in alignment.couplings
    }


def _grams(space: Space, structure: Structure, states: list[Mapping[str, Tensor]]) -> Tensor:
    """Return the inner products of the networks' rows of every unit, shape (units, networks, networks)."""
    home = next((states[0][place.tensor].device for place in structure.places), torch.device("cpu"))
    total = torch.zeros(space.size, len(states), len(states), dtype=torch.float64, device=home)
    for place in structure.places_of(space.name):
        rows = _rows(place, structure, states, home)
        square = rows.square().mean()
        total += torch.where(square > 0, torch.einsum("juf,kuf->ujk", rows, rows) / square, 0)
    for child in structure.children(space.name):
        total += _grams(child, structure, states).unflatten(0, (space.size, child.block)).sum(1)
    return total


def _rows(place: Place, structure: Structure, states: list[Mapping[str, Tensor]], home: torch.device) -> Tensor:
    tensors = [state[place.tensor].detach().to(home, torch.float64) for state in states]
    return torch.stack([unit_rows(tensor, structure, place).flatten(1) for tensor in tensors])


def _cosine(grams: Tensor) -> float:
    """Return the mean over units and pairs; a unit without any weight has no direction: its cosine is 0."""
    lengths = grams.diagonal(dim1=1, dim2=2).sqrt()
    products = lengths[:, :, None] * lengths[:, None, :]
    cosines = torch.where(products > 0, grams / products.clamp(min=1e-300), 0)
    return _pairs(cosines) if len(grams) else 0.0


def _cost(grams: Tensor) -> float:
    squares = grams.diagonal(dim1=1, dim2=2)
    both = squares[:, :, None] + squares[:, None, :]
    total = _pairs(both)
    return _pairs(both - 2 * grams) / total if total else 0.0


def _pairs(values: Tensor) -> float:
    """Return the mean over units and ordered pairs of different networks; values (units, networks, networks)."""
    count = values.shape[1]
    away = values.sum() - values.diagonal(dim1=1, dim2=2).sum()
    return float(away) / (len(values) * count * (count - 1))
