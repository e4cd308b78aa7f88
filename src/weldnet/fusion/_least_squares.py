"""Ridge regression of what is missing on what a layer reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from weldnet.errors import DataError

__all__ = ["Ridge"]

_CHUNK = 4096


@final
class Ridge:
    """Least squares for many outputs and residuals on the same rows, group by group.

    ``|x @ change + shift - residual|^2 + ridge * d * |change|^2`` is minimised, with d the mean diagonal of the normal
    matrix ``x^T x`` (of centred rows if there is a shift). With fewer rows than columns the dual system is solved.

    Args:
        x: shape (rows, groups, width).
        ridge: 0 or more.
        shift: whether there is a shift.

    Raises:
        DataError: the ridge is 0 and the rows do not determine the change.
    """

    def __init__(self, x: Tensor, ridge: float, *, shift: bool) -> None:
        self._shift = shift
        self._x = x.transpose(0, 1)
        self._center = x.mean(0, dtype=torch.float64) if shift else x.new_zeros(x.shape[1:], dtype=torch.float64)
        count, width = len(x), x.shape[2]
        self._dual = count < width
        if ridge == 0 and count < width + shift:
            raise DataError(
                f"{count} rows do not determine {width + shift} weights an output; give more unlabelled inputs, or a "
                "ridge above 0"
            )
        matrix, trace = self._matrix()
        weight = ridge * trace / width
        # Where all inputs are dead the matrix is zero but for rounding; a ridge makes the change zero.
        alive = trace > count * self._noise()
        weight = torch.where(alive, weight, torch.ones_like(weight))
        vague = (
            f"{count} rows do not determine {width} weights an output (some inputs are dead or depend on others); "
            "give more unlabelled inputs, or a ridge above 0"
        )
        if ridge == 0 and not bool(alive.all()):
            raise DataError(vague)
        try:
            eye = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
            self._factor = torch.linalg.cholesky(matrix + weight[:, None, None] * eye)
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise DataError(vague) from error

    def _noise(self) -> Tensor:
        """What rounding leaves of the squared deviations of a row whose inputs never change, for each group."""
        return self._center.square().sum(-1) * (16 * torch.finfo(self._x.dtype).eps) ** 2

    def solve(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the change, shape (groups, width, outputs of a group), and the shift, (groups x outputs of a group,).

        Args:
            residual: shape (rows, groups x outputs of a group).
        """
        groups, rows, _ = self._x.shape
        mean = residual.mean(0, dtype=torch.float64) if self._shift else residual.new_zeros(()).double()
        r = (residual - mean.to(residual.dtype)).reshape(rows, groups, -1).transpose(0, 1)
        if self._dual:
            change = self._centered(0, rows).transpose(1, 2) @ torch.cholesky_solve(r.double(), self._factor)
        else:
            change = torch.cholesky_solve(self._times(r), self._factor)
        moved = torch.einsum("gk,gko->go", self._center, change).reshape(-1)
        return change, (mean - moved if self._shift else torch.zeros_like(moved))

    def _matrix(self) -> tuple[Tensor, Tensor]:
        """The matrix to invert, float64, and the trace of the normal matrix for each group."""
        if self._dual:
            x = self._centered(0, self._x.shape[1])
            gram = x @ x.transpose(1, 2)
        else:
            gram = sum((c.transpose(1, 2) @ c).double() for c in self._chunks())
            assert isinstance(gram, Tensor)
        return gram, gram.diagonal(dim1=1, dim2=2).sum(1)

    def _times(self, r: Tensor) -> Tensor:
        total: Tensor | None = None
        for index, chunk in enumerate(self._chunks()):
            part = (chunk.transpose(1, 2) @ r[:, index * _CHUNK : (index + 1) * _CHUNK]).double()
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def _chunks(self) -> Iterator[Tensor]:
        for start in range(0, self._x.shape[1], _CHUNK):
            part = self._x[:, start : start + _CHUNK]
            yield part - self._center[:, None].to(part.dtype)

    def _centered(self, start: int, stop: int) -> Tensor:
        return self._x[:, start:stop].double() - self._center[:, None]
