"""What became of one round of a Flower strategy, as a value and as a line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from weldnet.federated import Aggregated, Dropped

__all__ = ["FlowerRound"]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class FlowerRound:
    """What became of one round.

    Args:
        number: the round, from 1, counted over resumed runs.
        aggregated: the next global model, and how it was made.
        missing: who was asked and did not answer in time.
        failed: who answered with an error, and what it said.
        values: what the clients in the model measured, by client.
        examples: how many samples they have, by client.
        seconds: from sending the model to having the next one.
    """

    number: int
    aggregated: Aggregated
    missing: tuple[str, ...]
    failed: tuple[Dropped, ...]
    values: Mapping[str, Mapping[str, float]]
    examples: Mapping[str, int]
    seconds: float

    def __str__(self) -> str:
        found = self.aggregated
        parts = [f"round {self.number}: {len(found.clients)} clients"]
        if found.skipped:
            parts = [f"round {self.number}: skipped, the model stays ({found.skipped})"]
        if "moved" in found.stats:
            parts.append(f"{found.stats['moved']:.2%} of the units moved")
        if "objective" in found.stats:
            parts.append(f"objective {found.stats['objective']:.6g}")
        if self.missing:
            parts.append(f"no answer from {', '.join(self.missing)}")
        parts += [f"dropped {entry}" for entry in (*self.failed, *found.dropped)]
        return "; ".join([*parts, f"{self.seconds:.1f} s"])

    @property
    def numbers(self) -> dict[str, Any]:
        """What Flower keeps of the round."""
        found = self.aggregated
        stats = {f"aggregation-{name}": float(value) for name, value in found.stats.items()}
        counts = {"clients": len(found.clients), "missing": len(self.missing)}
        return {**stats, **counts, "dropped": len(self.failed) + len(found.dropped), "seconds": self.seconds}
