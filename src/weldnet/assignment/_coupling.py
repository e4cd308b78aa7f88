"""Couplings: who maps to whom in one space.

``Permutation`` is hard. ``Plan`` is soft: how much of each unit of the network goes to each unit of the universe.
``NestedPlan`` is a plan of a space that is nested in another one: blocks go where the parent's plan says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from weldnet.assignment._nested import unfold
from weldnet.errors import AlignmentError

__all__ = ["Coupling", "NestedPlan", "Permutation", "Plan"]

#: How far the sums of a plan's rows and columns may be from its marginals, as a share of the largest.
_MARGINAL_TOLERANCE = 2e-3


@final
@dataclass(frozen=True, eq=False)
class Permutation:
    """A one-to-one coupling: universe unit ``u`` is the network's unit ``source[u]``.

    Args:
        source: integers of shape (units,), each of 0 .. units-1 once.

    Raises:
        AlignmentError: ``source`` is not a permutation.

    Example:
        >>> import torch
        >>> Permutation(torch.tensor([2, 0, 1])).inverse().source
        tensor([1, 2, 0])
    """

    source: Tensor

    def __post_init__(self) -> None:
        # A copy: later changes of the caller's tensor must not undo the check.
        source = self.source.detach().to("cpu", torch.int64, copy=True)
        whole = not self.source.is_floating_point()
        if not whole or source.dim() != 1 or not torch.equal(source.sort().values, torch.arange(len(source))):
            got = ", ".join(str(value) for value in self.source.flatten()[:8].tolist())
            raise AlignmentError(
                f"a permutation of shape (units,) holds each of 0..{source.numel() - 1} once, as integers; "
                f"got shape {tuple(source.shape)}: {got}{', ...' if source.numel() > 8 else ''}"
            )
        object.__setattr__(self, "source", source)

    @staticmethod
    def identity(units: int) -> Permutation:
        """Return the coupling that leaves every unit where it is."""
        return Permutation(torch.arange(units))

    def __len__(self) -> int:
        return len(self.source)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Permutation) and torch.equal(self.source, other.source)

    def __hash__(self) -> int:
        return hash(tuple(self.source.tolist()))

    def inverse(self) -> Permutation:
        """Return the coupling from the universe back to the network."""
        return Permutation(torch.argsort(self.source))

    def after(self, first: Permutation) -> Permutation:
        """Return the coupling of a network that was renumbered by ``first`` and then by this one."""
        return Permutation(first.source[self.source])

    def onto(self, back: Permutation) -> Permutation:
        """Return the coupling to a universe that is renumbered: its unit u was unit ``back.source[u]``."""
        return Permutation(self.source[back.source])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What the coupling is made of, by the names of its arguments."""
        return {"source": self.source}

    @property
    def moved(self) -> float:
        """The share of units that change their number."""
        if not len(self):
            return 0.0
        return float((self.source != torch.arange(len(self))).double().mean())

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the coupling as a 0/1 matrix of shape (network units, universe units)."""
        matrix = torch.zeros(len(self), len(self), dtype=dtype)
        matrix[self.source, torch.arange(len(self))] = 1
        return matrix


@final
@dataclass(frozen=True, eq=False)
class Plan:
    """A soft coupling: ``values[a, u]`` of the network's unit ``a`` goes to universe unit ``u``.

    Args:
        values: shape (network units, universe units), none below 0.
        rows: what each row sums to, shape (network units,); ones if left out.
        columns: what each column sums to, shape (universe units,); ones if left out.

    Raises:
        AlignmentError: the values are no such matrix.

    Example:
        >>> import torch
        >>> Plan(torch.tensor([[0.75, 0.25], [0.25, 0.75]])).moved
        0.25
    """

    values: Tensor
    rows: Tensor = field(default_factory=lambda: torch.empty(0))
    columns: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        values = _own(self.values, "a plan")
        if values.dim() != 2:
            raise AlignmentError(f"a plan has shape (network units, universe units); got {tuple(values.shape)}")
        rows = _own(self.rows, "a plan's rows") if self.rows.numel() else values.new_ones(len(values))
        columns = _own(self.columns, "a plan's columns") if self.columns.numel() else values.new_ones(values.shape[1])
        _check_marginals("a plan", values, rows, columns)
        for name, tensor in (("values", values), ("rows", rows), ("columns", columns)):
            object.__setattr__(self, name, tensor)

    def __len__(self) -> int:
        return len(self.values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and all(
            torch.equal(mine, theirs)
            for mine, theirs in zip(self.tensors.values(), other.tensors.values(), strict=True)
        )

    def __hash__(self) -> int:
        return hash(tuple(self.values.flatten()[:16].tolist()))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What the coupling is made of, by the names of its arguments."""
        return {"values": self.values, "rows": self.rows, "columns": self.columns}

    @property
    def balanced(self) -> bool:
        """Whether the plan is square with marginals of ones: then every unit arrives, and with its full weight."""
        return self.values.shape[0] == self.values.shape[1] and bool(
            (self.rows == 1).all() and (self.columns == 1).all()
        )

    @property
    def means(self) -> Tensor:
        """Each universe unit as a mean of units: the values with every column divided by its sum (0 if that is 0)."""
        return self.values / self.values.sum(0).clamp_min(torch.finfo(self.values.dtype).tiny)

    @property
    def splits(self) -> Tensor:
        """Each unit spread over the universe: the values with every row divided by its sum (0 if that is 0)."""
        return self.values / self.values.sum(1, keepdim=True).clamp_min(torch.finfo(self.values.dtype).tiny)

    @property
    def moved(self) -> float:
        """The share of the mass that changes its number."""
        return _off_diagonal(self.values)

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the coupling as a matrix of shape (network units, universe units)."""
        return self.values.to(dtype)

    def onto(self, back: Permutation) -> Plan:
        """Return the coupling to a universe that is renumbered: its unit u was unit ``back.source[u]``."""
        return Plan(self.values[:, back.source], self.rows, self.columns[back.source])


@final
@dataclass(frozen=True, eq=False)
class NestedPlan:
    """A soft coupling of a nested space: ``outer`` moves blocks as wholes, ``inner[a, u]`` what is inside.

    The whole coupling is ``outer[a, u] inner[a, u]``, block by block. Inner couplings may be hard where outer ones are
    soft; the type of ``inner`` says which.

    Args:
        outer: the parent's whole coupling, shape (blocks, universe blocks); rows and columns sum to 1.
        inner: for every pair of blocks integer sources (blocks, universe blocks, units), hard; or matrices whose rows
            and columns sum to 1, (blocks, universe blocks, units, units), soft.

    Raises:
        AlignmentError: the values are no such couplings.
    """

    outer: Tensor
    inner: Tensor

    def __post_init__(self) -> None:
        outer = _own(self.outer, "a nested plan's outer plan")
        if outer.dim() != 2 or outer.shape != self.inner.shape[:2] or self.inner.dim() not in (3, 4):
            raise AlignmentError(
                "a nested plan has an outer plan (blocks, universe blocks) and inner couplings (blocks, universe "
                f"blocks, units[, units]); got {tuple(outer.shape)} and {tuple(self.inner.shape)}"
            )
        _check_marginals(
            "a nested plan's outer plan", outer, outer.new_ones(len(outer)), outer.new_ones(outer.shape[1])
        )
        if self.inner.is_floating_point():
            inner = _own(self.inner, "a nested plan's inner plans")
            ones = inner.new_ones(inner.shape[-1])
            _check_marginals("a nested plan's inner plans", inner, ones, ones)
        else:
            inner = self.inner.detach().to("cpu", torch.int64, copy=True).contiguous()
            each = torch.arange(inner.shape[-1])
            if inner.dim() != 3 or not bool((inner.sort(-1).values == each).all()):
                raise AlignmentError("a nested plan's hard inner couplings are not permutations of each block's units")
        object.__setattr__(self, "outer", outer)
        object.__setattr__(self, "inner", inner)

    def __len__(self) -> int:
        return len(self.outer) * self.inner.shape[2]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, NestedPlan)
            and torch.equal(self.outer, other.outer)
            and self.inner.dtype == other.inner.dtype
            and torch.equal(self.inner, other.inner)
        )

    def __hash__(self) -> int:
        return hash(tuple(self.outer.flatten()[:16].tolist()))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What the coupling is made of, by the names of its arguments."""
        return {"outer": self.outer, "inner": self.inner}

    @property
    def hard_inside(self) -> bool:
        """Whether every pair of blocks has a permutation inside."""
        return not self.inner.is_floating_point()

    @property
    def block(self) -> int:
        """The number of units in a block."""
        return self.inner.shape[2]

    @property
    def moved(self) -> float:
        """The share of the mass that changes its number."""
        return _off_diagonal(self.matrix())

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the whole coupling as a matrix of shape (network units, universe units)."""
        return unfold(self.outer, self.inner).to(dtype)

    def onto(self, back: Permutation) -> NestedPlan:
        """Return the coupling to a universe that is renumbered: its unit u was unit ``back.source[u]``."""
        whole = back.source.reshape(-1, self.block)
        blocks, inside = whole[:, 0] // self.block, whole % self.block
        inner = self.inner[:, blocks]
        index = inside.reshape(1, len(blocks), *[1] * (inner.dim() - 3), self.block).expand_as(inner)
        return NestedPlan(self.outer[:, blocks], inner.gather(-1, index))


#: Who maps to whom in one space.
Coupling = Permutation | Plan | NestedPlan


def _own(values: Tensor, what: str) -> Tensor:
    """Copy, so that later changes of the caller's tensor do not undo the check."""
    if not values.is_floating_point():
        raise AlignmentError(f"{what} holds shares, as floats; got {values.dtype}")
    return values.detach().to("cpu", copy=True).contiguous()


def _check_marginals(what: str, values: Tensor, rows: Tensor, columns: Tensor) -> None:
    if rows.shape != values.shape[-2:-1] or columns.shape != values.shape[-1:]:
        raise AlignmentError(
            f"{what} of shape {tuple(values.shape)} has marginals of shapes {tuple(rows.shape)} and "
            f"{tuple(columns.shape)}; give one for each row and column"
        )
    if not bool((values >= 0).all()):  # NaN is not
        raise AlignmentError(f"{what} holds values below 0 or NaN; shares are 0 or more")
    for axis, declared, name in ((-1, rows, "rows"), (-2, columns, "columns")):
        error = (values.sum(axis) - declared).abs().amax() if values.numel() else values.new_zeros(())
        if not float(error) <= _MARGINAL_TOLERANCE * float(declared.abs().amax() if declared.numel() else 1):
            raise AlignmentError(f"{what}: {name} miss their marginals by up to {float(error):.3g}; scale them first")


def _off_diagonal(whole: Tensor) -> float:
    total = float(whole.double().sum())
    return 1 - float(whole.double().diagonal().sum()) / total if total else 0.0
