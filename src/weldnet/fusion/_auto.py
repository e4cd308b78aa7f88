"""Auto: the repair that brings the network nearest to its parents' ensemble, judged on inputs that none has seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from torch import Tensor

from weldnet.activations import Inputs
from weldnet.errors import UsageError
from weldnet.fusion._averaged import Averaged, Repaired
from weldnet.fusion._batch_norm import BatchNormReset, has_statistics
from weldnet.fusion._calibrate import Calibrate
from weldnet.fusion._guard import Guard
from weldnet.fusion._protocol import NoRepair, Repair
from weldnet.fusion._refit import Refit
from weldnet.fusion._rescale import Rescale
from weldnet.fusion._samples import gather, split
from weldnet.fusion._weights import WeightNorms

__all__ = ["Auto"]

#: Fewer unlabelled inputs than this leave too little to hold back.
_ENOUGH = 8


@final
@dataclass(frozen=True, kw_only=True)
class Auto:
    """Try the repairs that the inputs allow and keep the best, if it is better than none.

    A quarter of the unlabelled inputs is held back. Every candidate works on the rest, and what it makes is compared
    with the parents' ensemble on the held-back quarter (see :class:`Guard`), as it is and with a temperature fitted.
    The best candidate then works on all inputs; should that be farther from the ensemble on the held-back quarter than
    no repair, no repair it is. Fewer than 8 inputs are too few to hold any back: networks with BatchNorm statistics get
    :class:`BatchNormReset` on all of them, unjudged, and others nothing. Without inputs, networks with BatchNorm
    statistics get :class:`WeightNorms`.

    Args:
        samples: inputs to use at most.
        batch_size: inputs a batch, for data that does not come in batches.
    """

    samples: int = 1024
    batch_size: int = 128

    def __post_init__(self) -> None:
        if self.samples < 2 or self.batch_size < 1:
            raise UsageError(f"{self}: samples must be at least 2 and batch_size 1")

    def __call__(self, averaged: Averaged, data: Inputs | None, /) -> Repaired:
        """Return the best repair's copy, or the averaged network itself.

        Raises:
            DataError: inputs that the model rejects, or a single one.
        """
        if data is None:
            repair = WeightNorms() if has_statistics(averaged.model) else NoRepair()
            return repair(averaged, None)
        batches, count = gather("auto", averaged, data, self.samples, self.batch_size)
        if count < _ENOUGH:
            return self._few(averaged, batches, count)
        fitted, held = split(batches)
        guard = Guard(averaged, held)
        candidates = self._candidates(averaged)
        distances = {"none": guard.distance(averaged.model)}
        for name, repair in candidates.items():
            found = repair(averaged, fitted)
            distances[name] = guard.distance(found.model)
            if guard.is_classifier:
                calibrated = self._calibrated(replace(averaged, model=found.model), fitted)
                if calibrated is not None:
                    distances[f"{name}+calibrate"] = guard.distance(calibrated.model)
        best = min(distances, key=lambda name: distances[name])
        said = _say(distances, guard)
        numbers: dict[str, Any] = {"held_back": guard.count, "distances": distances, "chosen": best}
        if best == "none":
            return Repaired(averaged.model, f"auto: none, nothing came nearer: {said}", numbers)
        repaired = candidates[best.removesuffix("+calibrate")](averaged, batches)
        if best.endswith("+calibrate"):
            calibrated = self._calibrated(replace(averaged, model=repaired.model), batches)
            assert calibrated is not None
            repaired = Repaired(
                calibrated.model,
                f"{repaired.summary}; {calibrated.summary}",
                {**repaired.numbers, **calibrated.numbers},
            )
        final = guard.distance(repaired.model)
        numbers["final"] = final
        if not final <= distances["none"]:
            return Repaired(averaged.model, f"auto: none, {best} on all inputs was no nearer: {said}", numbers)
        return Repaired(repaired.model, f"auto: {repaired.summary}; {said}", {**repaired.numbers, **numbers})

    def _calibrated(self, averaged: Averaged, batches: list[Tensor]) -> Repaired | None:
        """Fit a temperature too; None where no layer can take it."""
        try:
            return Calibrate(samples=self.samples)(averaged, batches)
        except UsageError:
            return None

    def _candidates(self, averaged: Averaged) -> dict[str, Repair]:
        plain = BatchNormReset if has_statistics(averaged.model) else Rescale
        return {"data": plain(samples=self.samples), "refit": Refit(samples=self.samples)}

    def _few(self, averaged: Averaged, batches: list[Tensor], count: int) -> Repaired:
        if not has_statistics(averaged.model):
            return Repaired(
                averaged.model, f"auto: none, {count} unlabelled inputs are too few (give {_ENOUGH} or more)"
            )
        repaired = BatchNormReset(samples=self.samples)(averaged, batches)
        return Repaired(repaired.model, f"auto: {repaired.summary}, too few to hold any back", repaired.numbers)


def _say(distances: Mapping[str, float], guard: Guard) -> str:
    values = ", ".join(f"{name} {value:.3g}" for name, value in distances.items())
    kind = "divergence from" if guard.is_classifier else "squared distance to"
    return f"{kind} the parents' ensemble on {guard.count} held-back inputs: {values}"
