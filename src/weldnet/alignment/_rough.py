"""Matrix products in less than float32 while couplings are soft, and the check that they are near enough.

Sinkhorn blurs scores by its temperature, so that their last digits decide nothing there. bfloat16 has 8 bits of them,
TF32 11, and processors made for them are faster in them (``docs/results/speed.md``). Every score is held to a sample
of rows in float32, relative to what the scores differ by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from weldnet.errors import UsageError

__all__ = ["PRECISIONS", "Multiply", "Precision", "Rough", "in_float32"]

Precision = Literal["float32", "tf32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

#: How CUDA multiplies float32.
_Kind = Literal["ieee", "tf32"]

#: A matrix product, float32 in and out: ``multiply(a, b)`` is a @ b, ``multiply(a, b, c)`` is c - a @ b.
Multiply = Callable[..., Tensor]

#: What scores may be off by: root mean square, in standard deviations of the scores.
_TOLERANCE = 0.01
#: One row in so many is computed in float32 too, and at least so many rows.
_EVERY, _LEAST = 64, 4


@dataclass
class Rough:
    """Products in less than float32, and the spaces where they turned out to be too far off.

    Args:
        multiply: the product.
        check: the product in float32 that it is held to.
        exact: names of spaces that are scored in float32 from now on.
    """

    multiply: Multiply
    check: Multiply
    exact: set[str] = field(default_factory=set[str])

    @staticmethod
    def of(precision: Precision, device: torch.device) -> Rough | None:
        """Return products of this precision on a device; None for float32.

        Raises:
            UsageError: the device has no such products.
        """
        if precision == "float32":
            return None
        if precision == "tf32" and device.type != "cuda":
            raise UsageError(f"precision is 'tf32', which CUDA devices have; on {device} give 'bfloat16' or 'float32'")
        return Rough(_in_tf32, _in_ieee) if precision == "tf32" else Rough(_in_bfloat16, in_float32)

    def rows(self, units: int, device: torch.device) -> Tensor:
        """Return the numbers of the rows to look at, spread evenly."""
        return torch.arange(0, units, max(1, min(_EVERY, units // _LEAST)), device=device)

    def is_near(self, scores: Tensor, rows: Tensor, expected: Tensor) -> bool:
        """Whether scores are near enough to what some of their rows are in float32.

        Args:
            scores: shape (units, universe).
            rows: numbers of some units.
            expected: shape (rows, universe).

        Offsets of whole rows do not count, since couplings do not depend on them.
        """
        error = _centred(scores.index_select(0, rows) - expected)
        size = _centred(expected - scores.mean(0))
        return bool(error.square().mean() <= _TOLERANCE**2 * size.square().mean())


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(1, keepdim=True)


def in_float32(a: Tensor, b: Tensor, less: Tensor | None = None) -> Tensor:
    """Multiply as torch does."""
    return a @ b if less is None else torch.addmm(less, a, b, alpha=-1)


def _in_bfloat16(a: Tensor, b: Tensor, less: Tensor | None = None) -> Tensor:
    product = a.bfloat16() @ b.bfloat16()
    return product.float() if less is None else less - product


def _in_tf32(a: Tensor, b: Tensor, less: Tensor | None = None) -> Tensor:
    with _cuda_multiplies("tf32"):
        return in_float32(a, b, less)


def _in_ieee(a: Tensor, b: Tensor, less: Tensor | None = None) -> Tensor:
    with _cuda_multiplies("ieee"):
        return in_float32(a, b, less)


@contextmanager
def _cuda_multiplies(kind: _Kind) -> Iterator[None]:
    """Set how CUDA multiplies float32, and set it back; torch from 2.9 on refuses the older setting beside this one."""
    settings: Any = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(settings, "fp32_precision") else "allow_tf32"
    before = getattr(settings, name)
    setattr(settings, name, kind if name == "fp32_precision" else kind == "tf32")
    try:
        yield
    finally:
        setattr(settings, name, before)
