"""Keys that differ from a model's by one prefix, as a training framework's wrapper leaves it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from weldnet.checkpoints._match import tied_keys

__all__ = ["match_prefix", "prefix_hint"]


def match_prefix(state: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], str, str]:
    """Strip or add the one prefix with which a state's keys are exactly those of a model.

    Args:
        state: tensors by key.
        model: gives the keys that are wanted; of tied tensors one is enough. It is not changed.

    Returns:
        The state with the keys of the model, the prefix that was stripped from every key, and the prefix that was
        added to every key; the state as it is and two empty texts if its keys fit already, or with no prefix.
    """
    groups = tied_keys(model)
    if _fits(state, groups):
        return dict(state), "", ""
    for prefix in _common_prefixes(state):
        stripped = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
        if _fits(stripped, groups):
            return stripped, prefix, ""
    for prefix in _common_prefixes(groups):
        extended = {prefix + key: tensor for key, tensor in state.items()}
        if _fits(extended, groups):
            return extended, "", prefix
    return dict(state), "", ""


def prefix_hint(state: Mapping[str, Tensor], model: nn.Module) -> str:
    """Name the prefix that most of a state's keys have and the model's lack; empty if there is none.

    To be put behind an error message: it says what to do with a checkpoint that holds more than the network.
    """
    wanted = set(tied_keys(model))
    prefixes = {key[: i + 1] for key in state for i, letter in enumerate(key) if letter == "."}
    counts = {p: sum(key.startswith(p) and key[len(p) :] in wanted for key in state) for p in prefixes}
    best = max(sorted(counts), key=counts.__getitem__, default="")
    if not best or counts[best] <= sum(key in wanted for key in state):
        return ""
    return (
        f"without the prefix {best!r} {counts[best]} of its {len(state)} keys are keys of the model: "
        "save those alone, without the prefix"
    )


def _fits(keys: Mapping[str, object], groups: Mapping[str, list[str]]) -> bool:
    return all(key in groups for key in keys) and all(any(k in keys for k in group) for group in groups.values())


def _common_prefixes(keys: Mapping[str, object]) -> Iterator[str]:
    """Yield the prefixes that end with a dot and that all keys have, shortest first."""
    first = next(iter(keys), "")
    for i, letter in enumerate(first):
        prefix = first[: i + 1]
        if letter == "." and all(key.startswith(prefix) and key != prefix for key in keys):
            yield prefix
