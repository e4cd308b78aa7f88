"""Optimal transport: costs in, plans out. Rows and columns may differ in number and in weight."""

from __future__ import annotations

import torch
from torch import Tensor

from weldnet.errors import AlignmentError, UsageError

__all__ = ["entropic_plan", "exact_plan"]

#: The network simplex needs far fewer steps than this; it bounds the time on degenerate costs.
_STEPS = 10_000_000

#: Costs of at most 1 divided by this are still numbers.
_SMALLEST = 1e-290


def exact_plan(cost: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Minimise ``<T, cost>`` over plans T with the given marginals.

    Args:
        cost: shape (m, n), finite.
        rows: what each row sums to, shape (m,), above 0.
        columns: what each column sums to, shape (n,), above 0; in total as much as the rows.

    Returns:
        The plan, float64 on the CPU; at most m + n - 1 of its entries are not 0.

    Raises:
        AlignmentError: costs or marginals that no plan has.

    Source: the network simplex of ``ot.emd`` (Bonneel et al. 2011).
    """
    import ot

    table, a, b = _checked(cost, rows, columns)
    plan = torch.from_numpy(ot.emd(a.numpy(), b.numpy(), table.numpy(), numItermax=_STEPS))
    return plan * float(columns.sum())


def entropic_plan(
    cost: Tensor, rows: Tensor, columns: Tensor, epsilon: float, *, iterations: int = 1000
) -> tuple[Tensor, bool]:
    """Minimise ``<T, cost> - epsilon * max(cost) * entropy(T)`` over plans T with the given marginals.

    All of it is done in the log domain, so that no ``epsilon`` overflows. What the iterations leave of the marginals is
    then spread over the plan, so that they hold in any case.

    Args:
        cost: shape (m, n), finite.
        rows: what each row sums to, shape (m,), above 0.
        columns: what each column sums to, shape (n,), above 0; in total as much as the rows.
        epsilon: above 0, as a share of the largest cost.
        iterations: at most.

    Returns:
        The plan, float64 on the CPU, and whether the iterations met the marginals up to 1e-6.

    Raises:
        UsageError: epsilon is not above 0.
        AlignmentError: costs or marginals that no plan has.

    Source: Cuturi 2013; what is left of the marginals: Altschuler et al. 2017, algorithm 2.
    """
    if not epsilon > 0:
        raise UsageError(f"epsilon is {epsilon}; give a share of the largest cost above 0, or take the exact plan")
    table, a, b = _checked(cost, rows, columns)
    scores = -table / max(epsilon, _SMALLEST)
    row, column = torch.zeros_like(a), torch.zeros_like(b)
    for _ in range(iterations):
        before, row = row, a.log() - torch.logsumexp(scores + column, dim=1)
        column = b.log() - torch.logsumexp(scores + row[:, None], dim=0)
        if float((row - before).abs().amax()) <= 1e-10:
            break
    # The softmax is exp(scores + row + column) with exact columns; no potential can overflow in it.
    plan = torch.softmax(scores + row[:, None], dim=0) * b
    met = float((plan.sum(1) - a).abs().sum()) <= 1e-6
    return _rounded(plan, a, b) * float(columns.sum()), met


def _checked(cost: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return costs of at most 1, and marginals with a sum of 1."""
    table, a, b = (t.detach().to("cpu", torch.float64) for t in (cost, rows, columns))
    if table.shape != (len(a), len(b)) or not bool(torch.isfinite(table).all()):
        raise AlignmentError(
            f"costs of shape {tuple(table.shape)} for {len(a)} x {len(b)} units, or not finite; are the weights finite?"
        )
    for name, marginal in (("rows", a), ("columns", b)):
        if not bool((marginal > 0).all()) or not bool(torch.isfinite(marginal).all()):
            raise AlignmentError(f"the marginals of the {name} are not all above 0 and finite; no plan has them")
    if not torch.isclose(a.sum(), b.sum(), rtol=1e-6):
        raise AlignmentError(
            f"the rows sum to {float(a.sum()):.6g}, the columns to {float(b.sum()):.6g}; make them equal"
        )
    largest = float(table.abs().amax()) if table.numel() else 0.0
    return table / (largest or 1.0), a / a.sum(), b / b.sum()


def _rounded(plan: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Bring a plan that nearly has its marginals to one that has them."""
    tiny = torch.finfo(plan.dtype).tiny
    plan = plan * (rows / plan.sum(1).clamp_min(tiny)).clamp_max(1.0)[:, None]
    plan = plan * (columns / plan.sum(0).clamp_min(tiny)).clamp_max(1.0)[None, :]
    short, lacking = (rows - plan.sum(1)).clamp_min(0.0), (columns - plan.sum(0)).clamp_min(0.0)
    left = float(short.sum())
    return plan + short[:, None] * lacking[None, :] / left if left > 0 else plan
