"""Rescale: every channel gets back the deviation that averaging took from it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import final

from weldnet.activations import Inputs
from weldnet.errors import UsageError
from weldnet.fusion._averaged import Averaged, Repaired
from weldnet.fusion._bench import Bench
from weldnet.fusion._observation import observe, rescale
from weldnet.fusion._samples import gather

__all__ = ["Rescale"]


@final
@dataclass(frozen=True, kw_only=True)
class Rescale:
    """Match the deviation of every layer's outputs, channel by channel, to the parents'.

    Layer by layer, each after the earlier ones are mended: the outputs' standard deviation on unlabelled inputs becomes
    the mean, by shares, of the parents' on the same inputs, their channels carried to the universe. The scale is
    folded into weight and bias; with a BatchNorm behind, mean and deviation are matched there.

    Args:
        shift: match the means too, where there is a bias (REPAIR).
        samples: inputs to use at most.
        batch_size: inputs a batch, for data that does not come in batches.

    Source: Jordan et al., "REPAIR", https://arxiv.org/abs/2211.08403, section 4 and appendix (rescaling alone).
    """

    shift: bool = False
    samples: int = 1024
    batch_size: int = 128

    def __post_init__(self) -> None:
        if self.samples < 2 or self.batch_size < 1:
            raise UsageError(f"{self}: samples must be at least 2, a deviation needs two, and batch_size 1")

    def __call__(self, averaged: Averaged, data: Inputs | None, /) -> Repaired:
        """Return a rescaled copy.

        Raises:
            DataError: there is no data, fewer than two inputs, or inputs that the model rejects.
        """
        batches, count = gather("data", averaged, data, self.samples, self.batch_size)
        model = copy.deepcopy(averaged.model)
        bench = Bench(averaged, model)
        steps = bench.steps(batches[0])
        for step in steps:
            rescale(bench, step, observe(bench, step, batches), shift=self.shift)
        what = "means and deviations" if self.shift else "deviations"
        return Repaired(model, f"data: {what} of {len(steps)} layers matched on {count} unlabelled inputs")
