"""Kinds of studies: what a table's ``kind`` stands for. A new one is a module with these three names and one line here.

A kind's module has

- ``Protocol``: a strict pydantic model of the table's ``protocol``;
- ``cells(study, data) -> list[Cell]``: the pieces of work; ``data`` says what each dataset is, and is empty where
  nothing is to be computed (``--list``);
- ``run(cell, context) -> list[Record]``: does one of them, in any process.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from weldnet.data import Identity
    from weldnet.experiments._cells import Cell, Context
    from weldnet.experiments._config import Study
    from weldnet.records import Record

__all__ = ["KINDS", "StudyKind"]


@final
@dataclass(frozen=True)
class StudyKind:
    """A kind of study, imported when it is used."""

    module: str

    def protocol(self) -> Any:
        """Return the model of the protocol."""
        return importlib.import_module(self.module).Protocol

    def cells(self, study: Study, data: Mapping[tuple[str, str], Identity]) -> list[Cell]:
        """Return the pieces of work.

        Raises:
            ConfigError: a cell cannot be built.
        """
        return importlib.import_module(self.module).cells(study, data)

    def run(self, cell: Cell, context: Context) -> list[Record]:
        """Do one piece of work."""
        return importlib.import_module(self.module).run(cell, context)


KINDS: dict[str, StudyKind] = {
    "fusion": StudyKind("weldnet.experiments._fusion"),
    "federated": StudyKind("weldnet.experiments._federated"),
}
"""What the ``kind`` of a table stands for."""
