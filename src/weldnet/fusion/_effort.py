"""What a step of a fusion takes: time, memory, and how many unlabelled inputs it read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor
from torch.utils.data import Dataset

from weldnet.errors import WeldnetError
from weldnet.fusion._memory import watch_memory

__all__ = ["Counted", "Effort", "counted_inputs", "measured", "one_reason"]


@dataclass(frozen=True)
class Effort:
    """What a step took: seconds, peak growth in bytes (None where the system does not say), different inputs read."""

    seconds: float
    memory: int | None
    samples: int


class Counted(Dataset[Tensor]):
    """Unlabelled inputs that remember which of them were read."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs
        self.read: set[int] = set()

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Tensor:
        self.read.add(index)
        return self.inputs[index]


def counted_inputs(inputs: Tensor | None) -> Counted | None:
    """Wrap unlabelled inputs, if there are any."""
    return None if inputs is None else Counted(inputs)


@contextmanager
def measured(seen: Counted | None) -> Iterator[list[Effort]]:
    """Yield a list that holds the effort once the block ended."""
    found: list[Effort] = []
    with watch_memory() as peak:
        start = time.perf_counter()
        yield found
        seconds = time.perf_counter() - start
    found.append(Effort(seconds, peak.bytes, 0 if seen is None else len(seen.read)))


def one_reason(error: Exception) -> str:
    """Say on one line why something failed; an error that is not ours is named."""
    text = " ".join(str(error).split())
    return text if isinstance(error, WeldnetError) else f"{type(error).__name__}: {text}"
