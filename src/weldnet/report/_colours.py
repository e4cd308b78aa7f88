"""One colour and one mark for each method, in all figures, by day and by night.

Figures name colours by *tokens*: ``@gamf``, or ``@gamf/0.2`` for a fifth of its opacity. The page puts in the colours
of its theme, exported figures the light ones. The colours keep apart for colour-blind eyes as far as that many can, and
every method has a mark of its own besides.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["DASHES", "PALETTES", "assign", "resolve", "symbol", "token"]

#: By name: light, dark, mark.
_METHODS: dict[str, tuple[str, str, str]] = {
    "gamf": ("#0b5cad", "#6fb1f5", "circle"),
    "optimal_transport": ("#c2500c", "#f79b5f", "square"),
    "weight_matching": ("#0a7d5c", "#45c9a0", "diamond"),
    "activation_matching": ("#a8387e", "#ea93c6", "triangle-up"),
    "frank_wolfe": ("#9a7400", "#e5bf4d", "triangle-down"),
    "merge_many": ("#5a45a8", "#b0a0f2", "star"),
    "straight_through": ("#2a8fbd", "#8fd6f7", "pentagon"),
    "sinkhorn_rebasin": ("#4f6b12", "#aecb6b", "cross"),
    "matched_averaging": ("#7b4b2a", "#d3a179", "hexagon"),
    "fold": ("#3d5a73", "#9db8cf", "star-triangle-up"),
    "identity": ("#7a7f87", "#9aa1ab", "x"),
    "naive": ("#8b8f96", "#8d949e", "x"),
    "individual": ("#9aa0a8", "#7d858f", "triangle-left"),
    "best parent": ("#5c6370", "#aab1bb", "triangle-right"),
    "ensemble": ("#22262c", "#e6e9ee", "star-diamond"),
}
#: For names that are unknown.
_OTHERS = (
    *("gamf", "optimal_transport", "weight_matching", "activation_matching", "frank_wolfe", "merge_many"),
    *("straight_through", "matched_averaging", "best parent"),
)
#: The federated rules that have a method behind them.
_ALIASES = {
    "fedavg": "best parent",
    "average": "best parent",
    "otfusion": "optimal_transport",
    "fedma": "matched_averaging",
    "moon": "activation_matching",
}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")

_ROLES = {
    "ink": ("#1a1d21", "#e8eaed"),
    "muted": ("#5f6671", "#a3abb6"),
    "line": ("#d9dce1", "#333a44"),
    "paper": ("#ffffff", "#14171b"),
    "published": ("#1a1d21", "#e8eaed"),
    "heat0": ("#f4f6f9", "#1b2027"),
    "heat1": ("#9dc0e6", "#2f5f93"),
    "heat2": ("#0b3f78", "#bfe0ff"),
}
PALETTES: Mapping[str, Mapping[str, str]] = {
    theme: {name: colours[index] for name, colours in {**_METHODS, **_ROLES}.items()}
    for index, theme in enumerate(("light", "dark"))
}


def token(name: str, opacity: float | None = None) -> str:
    """Return the token of a method's colour, or of a role's.

    >>> token("gamf"), token("gamf", 0.2)
    ('@gamf', '@gamf/0.2')
    """
    return f"@{name}" if opacity is None else f"@{name}/{opacity:g}"


def assign(names: Iterable[str]) -> dict[str, str]:
    """Give every name an entry of the palette: a method its own, an unknown name always the same one.

    >>> assign(["gamf", "fedavg"])
    {'gamf': 'gamf', 'fedavg': 'best parent'}
    """
    return {name: _entry(name) for name in names}


def _entry(name: str) -> str:
    if name in _METHODS:
        return name
    base = re.split(r"-| \+ ", name, maxsplit=1)[0]
    if name not in _ALIASES and base != name and (base in _METHODS or base in _ALIASES):
        return _entry(base)  # a variant of it, such as gamf-joint
    return _ALIASES.get(name) or _OTHERS[zlib.crc32(name.encode()) % len(_OTHERS)]


def symbol(entry: str) -> str:
    """Return the mark of a palette's entry."""
    return _METHODS[entry][2] if entry in _METHODS else "circle"


def resolve(value: Any, theme: str = "light", *, key: str = "") -> Any:
    """Replace the tokens in nested data, where colours stand, by the colours of a theme.

    >>> resolve({"color": "@gamf/0.5", "text": "@gamf"})
    {'color': 'rgba(11,92,173,0.5)', 'text': '@gamf'}
    """
    if isinstance(value, Mapping):
        return {name: resolve(entry, theme, key=str(name)) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [resolve(entry, theme, key=key) for entry in value]
    if not key.endswith(("color", "colorscale")) or not isinstance(value, str) or not value.startswith("@"):
        return value
    name, _, opacity = value[1:].partition("/")
    colour = PALETTES[theme].get(name)
    if colour is None:
        return value
    return _rgba(colour, opacity) if opacity else colour


def _rgba(colour: str, opacity: str) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
