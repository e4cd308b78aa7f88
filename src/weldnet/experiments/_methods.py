"""Methods as tables write them: a name, and the options that are not its defaults."""

from __future__ import annotations

from typing import Any

from weldnet.alignment import AlignmentMethod, make_method
from weldnet.errors import ConfigError

__all__ = ["NAIVE", "parse_method"]

NAIVE = "naive"
"""The average of the networks as they are."""


def parse_method(text: str) -> AlignmentMethod:
    """Read a method such as ``gamf sigma=4.0 tau=0.3``.

    Raises:
        ConfigError: an option is not KEY=VALUE.
        UsageError: an unknown method or option.

    >>> parse_method("gamf sigma=4.0").sigma
    4.0
    """
    name, *pairs = text.split()
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"method {text!r}: {pair!r} is not KEY=VALUE; write it as in 'gamf sigma=4.0'")
        options[key] = _value(value)
    return make_method(name, **options)


def _value(text: str) -> Any:
    words = {"true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
