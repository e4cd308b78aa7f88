"""What a client sends, and what is thrown away of it before anything is averaged."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import final

import torch
from torch import Tensor

from weldnet._words import counted
from weldnet.checkpoints import tensors_sha256, validate_finite
from weldnet.errors import CheckpointError, WeldnetError
from weldnet.federated._blueprint import Blueprint
from weldnet.structure import Structure

__all__ = ["ClientUpdate", "Dropped", "Screen", "Sound"]

_UNREADABLE = (WeldnetError, OSError, LookupError, AttributeError, TypeError, RuntimeError, ValueError)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ClientUpdate:
    """One client's network after local training.

    Args:
        client: who sends it; stable over the rounds.
        state: tensors by name. Any mapping will do, also one that reads a file tensor by tensor; each tensor is read
            once for checking and carrying, and let go before the next client's.
        examples: how many samples it was trained on.
        classes: how many of them each class has, where a rule needs it (``fedma``).
        values: what the client measured, for the records.
    """

    client: str
    state: Mapping[str, Tensor]
    examples: int
    classes: Mapping[int, int] | None = None
    values: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))


@final
@dataclass(frozen=True)
class Dropped:
    """A client whose update was not used, and why."""

    client: str
    reason: str

    def __str__(self) -> str:
        return f"{self.client}: {self.reason}"


@final
@dataclass(frozen=True, eq=False)
class Sound:
    """An update that fits: its tensors in memory, and the structure that they have."""

    update: ClientUpdate
    state: Mapping[str, Tensor]
    structure: Structure

    @property
    def client(self) -> str:
        """Who sent it."""
        return self.update.client


class Screen:
    """Goes through updates in the order of the clients' names, one in memory at a time, and drops what is unfit.

    Dropped is an update without samples, with NaN or Inf, of another architecture or of other widths (where the rule
    needs equal ones), with other settings in whole numbers, and every update of a client that sent two different ones.

    Args:
        updates: as they arrived; their order does not matter.
        reference: the model that the server has.
        blueprint: what is known about it.
        any_width: whether other widths are welcome.
        classes: whether class counts are needed.
    """

    def __init__(
        self,
        updates: Sequence[ClientUpdate],
        reference: Mapping[str, Tensor],
        blueprint: Blueprint,
        *,
        any_width: bool = False,
        classes: bool = False,
    ) -> None:
        self.dropped: list[Dropped] = []
        self._reference, self._blueprint = reference, blueprint
        self._any_width, self._classes = any_width, classes
        self._updates = self._without_duplicates(sorted(updates, key=lambda update: update.client))

    def __iter__(self) -> Iterator[Sound]:
        for update in self._updates:
            try:
                sound, reason = self._read(update), ""
            except _UNREADABLE as error:
                sound, reason = None, _one_line(error)
            if sound is None:
                self.drop(update.client, reason)
            else:
                yield sound

    def drop(self, client: str, reason: str) -> None:
        """Note that a client's update is not used."""
        self.dropped.append(Dropped(client, reason))

    def _without_duplicates(self, updates: list[ClientUpdate]) -> list[ClientUpdate]:
        counts = Counter(update.client for update in updates)
        kept: list[ClientUpdate] = []
        for client, count in sorted(counts.items()):
            own = [update for update in updates if update.client == client]
            if count > 1 and not _all_equal(own):
                self.drop(client, f"{count} different updates with this name; names must be unique")
                continue
            if count > 1:
                self.drop(client, f"sent the same update {count} times; counted once")
            kept.append(own[0])
        return kept

    def _read(self, update: ClientUpdate) -> Sound:
        if not (isinstance(update.examples, int) and update.examples > 0):
            raise CheckpointError(f"trained on {update.examples} samples; an update counts by its samples")
        if self._classes:
            _check_classes(update)
        state = {name: update.state[name] for name in update.state}
        _check_kinds(state, self._reference)
        _check_settings(state, self._reference)
        structure = self._blueprint.structure_of(state, self._reference, any_width=self._any_width)
        validate_finite(state, update.client)
        return Sound(update, state, structure)


def _all_equal(updates: Sequence[ClientUpdate]) -> bool:
    """Whether updates are the same one; those that cannot be read are not."""
    try:
        return len({(update.examples, tensors_sha256(dict(update.state))) for update in updates}) == 1
    except _UNREADABLE:
        return False


def _check_classes(update: ClientUpdate) -> None:
    if not update.classes:
        raise CheckpointError("sent no class counts, which the rule weighs the last layer by")
    if any(count < 0 or math.isnan(count) for count in update.classes.values()):
        raise CheckpointError("sent a class count below 0")


def _check_kinds(state: Mapping[str, object], reference: Mapping[str, Tensor]) -> None:
    missing, extra = [n for n in reference if n not in state], [n for n in state if n not in reference]
    if missing or extra:
        parts = [f"lacks {counted(len(missing), 'tensor')} ({missing[0]!r})"] if missing else []
        parts += [f"has {counted(len(extra), 'unknown tensor')} ({extra[0]!r})"] if extra else []
        raise CheckpointError(f"another architecture: it {' and '.join(parts)}")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{name} is a {type(tensor).__name__}, not a tensor")
        if (tensor.is_floating_point(), tensor.is_complex()) != _kind(reference[name]):
            raise CheckpointError(f"{name} is {tensor.dtype}, the server's {reference[name].dtype}")


def _check_settings(state: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> None:
    """Refuse whole numbers and truth values that are neither counters nor the server's: they have no mean."""
    for name, own in reference.items():
        counter = own.numel() == 1 and own.dtype != torch.bool
        if own.is_floating_point() or own.is_complex() or counter or state[name].shape != own.shape:
            continue
        if not torch.equal(state[name].to(own.device, own.dtype), own):
            raise CheckpointError(
                f"{name}: its {str(own.dtype).removeprefix('torch.')} values differ from the server's, and have no "
                "average (they are settings, not learned)"
            )


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, WeldnetError) else f"{type(error).__name__}: {text}"
