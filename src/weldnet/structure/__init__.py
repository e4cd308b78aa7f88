"""Structure: what can be renumbered in a model, found from one forward pass, as data."""

from weldnet.structure._capture import capture
from weldnet.structure._check import Check, Referee, check, random_renumbering
from weldnet.structure._move import carried_rows, renumber, unit_rows
from weldnet.structure._spec import Frozen, Layout, Place, Space, Structure

__all__ = [
    "Check",
    "Frozen",
    "Layout",
    "Place",
    "Referee",
    "Space",
    "Structure",
    "capture",
    "carried_rows",
    "check",
    "random_renumbering",
    "renumber",
    "unit_rows",
]
