"""A weighted mean of state dicts that come one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

__all__ = ["Mean"]


@final
class Mean:
    """Sums networks in float64, one after the other, so that memory does not grow with their number.

    With whole numbers as weights the mean of equal networks is that network bit for bit. Integers have no mean: they
    take the largest value, as counters (such as ``num_batches_tracked``) should; all others are equal in sound updates.

    Args:
        reference: gives dtypes and devices, and the zero that ``spread`` is measured from.
        learned: the tensors that ``spread`` is measured on.
        rows: of some tensors, the axis along which weights may differ.
    """

    def __init__(
        self, reference: Mapping[str, Tensor], learned: frozenset[str], rows: Mapping[str, int] | None = None
    ) -> None:
        self._reference, self._learned, self._rows = reference, learned, rows or {}
        self._sums: dict[str, Tensor] = {}
        self._whole: dict[str, Tensor] = {}
        self._row_sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._total = 0.0
        self._spread = 0.0

    def add(self, state: Mapping[str, Tensor], weight: float, along: Tensor | None = None) -> None:
        """Add one network.

        Args:
            state: tensors by name; not kept.
            weight: how much it counts, above 0.
            along: how much each position counts along the axes in ``rows``, shape (positions,), 0 or more.
        """
        self._total += weight
        spread = 0.0
        for name, tensor in state.items():
            reference = self._reference[name]
            tensor = tensor.detach().to(reference.device)
            if not (tensor.is_floating_point() or tensor.is_complex()):
                self._count(name, tensor.to(reference.dtype))
                continue
            wide = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
            if name in self._sums:
                self._sums[name].add_(wide, alpha=weight)
            else:
                self._sums[name] = wide * weight
            if name in self._rows and along is not None:
                self._add_rows(name, wide, along)
            if name in self._learned and wide.shape == reference.shape:
                spread += float((wide - reference.to(wide.dtype)).abs().square().sum())
        self._spread += weight * spread

    @property
    def spread(self) -> float:
        """The weighted mean of the networks' squared distances from the reference, over what is learned."""
        return self._spread / self._total if self._total else 0.0

    def result(self) -> dict[str, Tensor]:
        """Return the mean, in the reference's dtypes."""
        found: dict[str, Tensor] = {}
        for name, reference in self._reference.items():
            if name in self._whole:
                found[name] = self._whole[name]
                continue
            mean = self._sums[name] / self._total
            if name in self._row_sums:
                sums, weights = self._row_sums[name]
                mean = torch.where(weights > 0, sums / weights.clamp(min=1e-300), mean)
            found[name] = mean.to(reference.dtype)
        return found

    def _add_rows(self, name: str, wide: Tensor, along: Tensor) -> None:
        shape = [1] * wide.dim()
        shape[self._rows[name]] = -1
        weights = along.to(wide.device, torch.float64).view(shape)
        sums, total = self._row_sums.get(name, (torch.zeros_like(wide), torch.zeros_like(weights)))
        self._row_sums[name] = (sums + wide * weights, total + weights)

    def _count(self, name: str, tensor: Tensor) -> None:
        known = self._whole.get(name)
        self._whole[name] = tensor.clone() if known is None else torch.maximum(known, tensor)
