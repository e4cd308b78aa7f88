"""The rules by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weldnet.alignment import METHODS, MatchedAveraging, make_method
from weldnet.errors import UsageError
from weldnet.federated._matched import FedMA, Matched
from weldnet.federated._rule import FedAvg, Rule

__all__ = ["RULES", "make_rule"]


def make_rule(rule: str | Rule | Mapping[str, Any]) -> Rule:
    """Return a rule by name, from a mapping, or as it is.

    Names are ``fedavg``, ``fedma``, ``fedma-layers``, ``fedma-layers-growth`` and those of the alignment methods;
    ``-joint`` and ``-uniform`` may follow, in this order. A mapping has ``name`` (without suffixes), and may have
    ``weighting``, ``anchor``, the method's options, and for ``fedma`` ``layers``.

    Raises:
        UsageError: an unknown name or option; the message lists the known ones.

    >>> make_rule("fedavg-uniform"), make_rule("gamf-joint").name
    (FedAvg(weighting='uniform'), 'gamf-joint')
    """
    if not isinstance(rule, str | Mapping):
        if isinstance(rule, type) or not isinstance(rule, Rule):
            raise UsageError(f"rule is {rule!r}; give a name such as 'gamf', or an object such as Matched()")
        return rule
    options: dict[str, Any] = dict(rule) if isinstance(rule, Mapping) else {"name": rule}
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise UsageError(f"rule {rule!r} has no name; give one of {', '.join(RULES)}")
    if isinstance(rule, str):
        if name.endswith("-uniform"):
            name, options["weighting"] = name.removesuffix("-uniform"), "uniform"
        if name.endswith("-joint"):
            name, options["anchor"] = name.removesuffix("-joint"), "joint"
        for suffix in ("growth", "layers"):
            if name.startswith("fedma-") and name.endswith(f"-{suffix}"):
                name, options[suffix] = name.removesuffix(f"-{suffix}"), True
    own: dict[str, Any] = {key: options.pop(key) for key in ("weighting", "anchor") if key in options}
    if name == "fedavg":
        unknown = sorted(options) + (["anchor"] if "anchor" in own else [])
        if unknown:
            raise UsageError(f"fedavg has no option {unknown[0]!r}; it has weighting")
        return FedAvg(**own)
    if name == "fedma":
        own |= {key: options.pop(key) for key in ("layers",) if key in options}
        method = make_method("matched_averaging", **options)
        assert isinstance(method, MatchedAveraging)
        return FedMA(method=method, **own)
    if name not in METHODS:
        raise UsageError(f"unknown rule {name!r}; weldnet has {', '.join(RULES)}")
    return Matched(method=make_method(name, **options), **own)


RULES: tuple[str, ...] = ("fedavg", "fedma", *METHODS)
"""The names of the rules, without suffixes."""
