"""What :func:`weldnet.fuse_files` gives."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from weldnet.alignment import Alignment
from weldnet.fusion import Report
from weldnet.structure import Structure

__all__ = ["Streamed"]


@final
@dataclass(frozen=True)
class Streamed:
    """A fused network on disk.

    Args:
        path: the folder with its shards.
        alignment: who went where.
        structure: what was renumbered.
        report: the numbers; print it.
        config: the resolved settings.
        parents: by name, a SHA-256 of each parent's tensors.
        metadata: where the fused network comes from, as it stands in every shard.
    """

    path: Path
    alignment: Alignment
    structure: Structure
    report: Report
    config: Mapping[str, Any]
    parents: Mapping[str, str]
    metadata: Mapping[str, str]

    @property
    def widths(self) -> dict[str, int]:
        """Spaces that were made wider than the parents': none."""
        return {}

    def provenance(self, files: Sequence[str | os.PathLike[str]] = ()) -> dict[str, str]:
        """Return where the fused network comes from; the files are those that it was made of."""
        return dict(self.metadata)

    def __str__(self) -> str:
        return str(self.report)
