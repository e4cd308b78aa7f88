"""From checkpoint files to named networks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weldnet.cli._common import say
from weldnet.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["load_network", "load_networks", "name_files"]

_INDEX = ".index.json"


def load_network(model: nn.Module, file: Path, name: str) -> nn.Module:
    """Return a copy of a model with the weights of a file; a prefix that all keys share is no hindrance.

    Raises:
        CheckpointError: the file cannot be read, does not fit the model, or holds NaN or Inf.
    """
    from weldnet.checkpoints import load, load_into, match_prefix, prefix_hint, validate_finite

    network = copy.deepcopy(model)
    state, stripped, added = match_prefix(load(file), network)
    if stripped or added:
        done = f"without their prefix {stripped!r}" if stripped else f"with the prefix {added!r}"
        say(f"{file}: all keys are read {done}, which makes them the model's", kind="note")
    try:
        load_into(network, state, name)
    except CheckpointError as error:
        hint = prefix_hint(state, network)
        if not hint:
            raise
        raise CheckpointError(f"{error}; {hint}") from error
    validate_finite(state, name)
    return network.eval()


def load_networks(model: nn.Module, files: Sequence[Path]) -> dict[str, nn.Module]:
    """Return one network for each file, by the names of `name_files`; errors as `load_network`."""
    return {name: load_network(model, file, name) for name, file in zip(name_files(files), files, strict=True)}


def name_files(files: Sequence[Path]) -> list[str]:
    """Name networks after their files; folders come in where two files have one name, then numbers.

    >>> name_files([Path("a.pt"), Path("b.pt")]), name_files([Path("1/m.pt"), Path("2/m.pt")])
    (['a', 'b'], ['1/m', '2/m'])
    >>> name_files([Path("a.pt"), Path("a.pt")])
    ['a', 'a#2']
    """
    stems = [_stem(file) for file in files]
    longer = [f"{file.resolve().parent.name}/{stem}" for file, stem in zip(files, stems, strict=True)]
    homes = {stem: {long for short, long in zip(stems, longer, strict=True) if short == stem} for stem in stems}
    chosen = [long if len(homes[stem]) > 1 else stem for stem, long in zip(stems, longer, strict=True)]
    names: list[str] = []
    for name in chosen:
        count = chosen[: len(names)].count(name)
        names.append(f"{name}#{count + 1}" if count else name)
    return names


def _stem(file: Path) -> str:
    name = file.name or file.resolve().name
    return name.removesuffix(_INDEX).rpartition(".")[0] or name.removesuffix(_INDEX)
