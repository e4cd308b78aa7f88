"""What :func:`weldnet.fuse` gives."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn

from weldnet.alignment import Alignment
from weldnet.checkpoints import WIDTHS, provenance, save
from weldnet.errors import CheckpointError
from weldnet.fusion._report import Report
from weldnet.structure import Structure

__all__ = ["Fusion"]


@final
@dataclass(frozen=True)
class Fusion:
    """What :func:`fuse` gives.

    Args:
        model: the fused network, of the first parent's class.
        alignment: who went where.
        structure: what was renumbered.
        report: the numbers; print it.
        config: the resolved settings, for the record.
        parents: by name, a SHA-256 of each parent's tensors.
    """

    model: nn.Module
    alignment: Alignment
    structure: Structure
    report: Report
    config: Mapping[str, Any]
    parents: Mapping[str, str]

    def __str__(self) -> str:
        return str(self.report)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the fused network's tensors."""
        return dict(self.model.state_dict())

    def save(self, path: str | os.PathLike[str], *, files: Sequence[str | os.PathLike[str]] = ()) -> None:
        """Write the fused weights with their provenance, atomically.

        Args:
            path: ``.safetensors`` (with metadata), ``.pt``, ``.pth`` or ``.bin``.
            files: the parents' checkpoints, whose names and SHA-256 go into the metadata; without them the hashes of
                the parents' tensors do.

        Raises:
            CheckpointError: the file cannot be written, or has no place for the widths of a network that is wider than
                its parents; nothing is left behind.
        """
        if self.widths and Path(path).suffix != ".safetensors":
            raise CheckpointError(
                f"{str(path)!r}: only .safetensors has a place for the widths of a network that is wider than its "
                "parents; choose that extension"
            )
        save(self.state_dict(), path, metadata=self.provenance(files))

    @property
    def widths(self) -> dict[str, int]:
        """How many units each space has that was made wider than the parents'; empty at size 1."""
        apart = self.report.size.apart if self.report.size is not None else {}
        return {space: after for space, (_, after) in apart.items()}

    def provenance(self, files: Sequence[str | os.PathLike[str]] = ()) -> dict[str, str]:
        """Return where the fused network comes from, as :meth:`save` writes it.

        Args:
            files: the parents' checkpoints.

        Raises:
            CheckpointError: a parent's file cannot be read.
        """
        metadata = provenance(files, dict(self.config), int(self.config.get("seed", 0)))
        if not files:
            metadata["parents"] = json.dumps([{"name": n, "tensors_sha256": h} for n, h in self.parents.items()])
        if self.widths:
            metadata[WIDTHS] = json.dumps(self.widths)
        return metadata
