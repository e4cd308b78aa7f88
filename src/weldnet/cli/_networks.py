"""From checkpoint files to named networks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weldnet.cli._common import say
from weldnet.cli._early import is_pretrained
from weldnet.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from weldnet.alignment import AlignmentMethod

__all__ = ["align_networks", "gather_networks", "load_network", "name_files"]

_INDEX = ".index.json"


def gather_networks(spec: str | Sequence[str] | None, files: Sequence[Path]) -> dict[str, nn.Module]:
    """Load networks by the names of `name_files`.

    Args:
        spec: the model, or one for each file; None (or nothing) if all files are folders of the transformers library,
            which say it themselves.
        files: checkpoints.

    Raises:
        UsageError, ModelError: as `build_model`.
        CheckpointError: as `load_network`; the folders hold networks of different architectures.
    """
    from weldnet.cli._model import build_model
    from weldnet.cli._pretrained import load_pretrained, require_alike

    names = name_files(files)
    if spec is not None and not isinstance(spec, str):
        if len(spec) > 1:
            return {
                name: load_network(build_model(each), file, name)
                for name, each, file in zip(names, spec, files, strict=True)
            }
        spec = spec[0] if spec else None
    from_folders = spec is None or is_pretrained(Path(spec))
    folders = [file for file in files if from_folders and is_pretrained(file)]
    if folders:
        require_alike(folders if spec is None else [Path(spec), *folders])
    model = None if spec is None or len(folders) == len(files) else build_model(spec)
    networks: dict[str, nn.Module] = {}
    for name, file in zip(names, files, strict=True):
        if file in folders:
            networks[name] = load_pretrained(file, name)
        else:
            assert model is not None
            networks[name] = load_network(model, file, name)
    return networks


def align_networks(
    networks: Mapping[str, nn.Module],
    spec: str | None,
    method: AlignmentMethod,
    *,
    outputs: Sequence[str] | None = None,
    data: Tensor | None = None,
    seed: int = 0,
    device: str | None = None,
) -> dict[str, nn.Module]:
    """Return copies of networks in the first one's order of units; what each computes is proved to be the same.

    Args:
        networks: by name.
        spec: what they take, as for `make_input`.
        method: how to align.
        outputs: what counts as output.
        data: unlabelled inputs, for methods that look at activations.
        seed: of everything random.
        device: where to align, and to run networks for methods that look at activations.

    Raises:
        WeldnetError: as `weldnet.capture`, `weldnet.check` and `weldnet.align`.
    """
    from weldnet.alignment import align, transport
    from weldnet.checkpoints import load_into
    from weldnet.cli._input import make_input
    from weldnet.structure import capture, check

    first, *others = networks
    example_input = make_input(spec, networks[first], seed=seed)
    structure = capture(networks[first], example_input, outputs)
    for name in others:
        check(networks[name], make_input(spec, networks[name], seed=seed), structure, seed=seed)
    alignment = align(networks, structure, method=method, data=data, seed=seed, device=device).relative_to(first)
    moved = {name: copy.deepcopy(network) for name, network in networks.items()}
    for name, network in moved.items():
        load_into(network, transport(network.state_dict(), structure, alignment[name]), name)
    return moved


def load_network(model: nn.Module, file: Path, name: str) -> nn.Module:
    """Return a copy of a model with the weights of a file; a prefix that all keys share is no hindrance.

    It gets as wide as the network in the file, where weldnet widened that.

    Raises:
        CheckpointError: the file cannot be read, does not fit the model, or holds NaN or Inf.
    """
    from weldnet.checkpoints import load, load_into, match_prefix, prefix_hint, read_widths, resized, validate_finite

    network = copy.deepcopy(model)
    state, stripped, added = match_prefix(load(file), network)
    if stripped or added:
        done = f"without their prefix {stripped!r}" if stripped else f"with the prefix {added!r}"
        say(f"{file}: all keys are read {done}, which makes them the model's", kind="note")
    try:
        network = network if read_widths(file) is None else resized(network, state)
        load_into(network, state, name)
    except CheckpointError as error:
        hint = prefix_hint(state, network)
        if not hint:
            raise
        raise CheckpointError(f"{error}; {hint}") from error
    validate_finite(state, name)
    return network.eval()


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
