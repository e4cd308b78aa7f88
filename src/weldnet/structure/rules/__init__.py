"""What each operation does to units: one small rule family per kind of operation."""

from weldnet.structure.rules._table import apply, knows

__all__ = ["apply", "knows"]
