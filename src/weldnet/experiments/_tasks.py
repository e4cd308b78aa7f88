"""What the workers of a fusion study are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from weldnet.experiments._networks import NetworkSpec
from weldnet.experiments._protocol import Protocol

__all__ = ["GroupTask", "NetworkTask"]


@final
@dataclass(frozen=True)
class NetworkTask:
    """Train one network, if the cache has not got it."""

    spec: NetworkSpec


@final
@dataclass(frozen=True)
class GroupTask:
    """Fuse the networks of a group by one method; None scores them and their ensemble instead."""

    specs: tuple[NetworkSpec, ...]
    method: str | None
    protocol: Protocol
