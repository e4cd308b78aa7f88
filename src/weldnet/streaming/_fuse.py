"""Fuse from disk to disk: tensors are read when they are needed, and no network is ever in memory whole."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weldnet._arrays import find_device
from weldnet._version import __version__
from weldnet.alignment import (
    AlignmentMethod,
    Gamf,
    Identity,
    WeightMatching,
    choose_auto,
    describe,
    make_method,
    require_device,
)
from weldnet.checkpoints import StoredState, check_writable, parse_size, tensors_sha256
from weldnet.errors import CheckpointError, UsageError
from weldnet.fusion import Report, Row, has_statistics, normalise_weights, twins
from weldnet.streaming._job import Job, PathLike
from weldnet.streaming._meter import Meter
from weldnet.streaming._streamed import Streamed
from weldnet.streaming._unfinished import Unfinished, identity_of
from weldnet.structure import build_weightless, capture, without_weights

__all__ = ["fuse_files"]

#: Methods that go on from what a workspace kept, and read tensors place by place.
_METHODS = (WeightMatching, Gamf, Identity)
_NAMES = "weight_matching, gamf, identity"


def fuse_files(
    files: Sequence[PathLike] | Mapping[str, PathLike],
    example_input: Any,
    *,
    model: nn.Module | Callable[[], nn.Module],
    out: PathLike,
    outputs: str | Sequence[str] | None = None,
    route: str = "auto",
    method: str | AlignmentMethod = "gamf",
    weights: Sequence[float] | Mapping[str, float] | None = None,
    check: bool = True,
    shard_size: int | str = "2GB",
    companions: Sequence[PathLike] = (),
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
    **options: Any,
) -> Streamed:
    """Fuse checkpoints that are larger than memory, tensor by tensor, into a sharded checkpoint.

    The same alignment and average as :func:`weldnet.fuse` makes, without its repairs. Beside the output lies
    ``<out>.unfinished`` until all is done; if the process is killed, the same call goes on from there and gives the
    same bytes.

    Args:
        files: safetensors checkpoints, in a list (named ``"a"``, ``"b"``, ...) or by name: files, indices or folders.
        example_input: as for :func:`weldnet.fuse`.
        model: a function that builds the network (its parameters never take memory), or a network, whose weights do
            not count and may be on the meta device.
        out: a new folder for the shards and their index.
        outputs: as for :func:`weldnet.capture`.
        route: as for :func:`weldnet.capture`.
        method: ``"gamf"``, ``"weight_matching"``, ``"identity"``, or an object of one of these.
        weights: shares in the average, summing to 1; equal if None.
        check: prove on every network, with its real weights read from disk, that renumbering keeps its outputs; once at
            random, and once along the alignment before anything is averaged.
        shard_size: of one output file, in bytes or as ``"500MB"``; a single larger tensor gets a file of its own.
        companions: files to copy beside the shards, such as a tokenizer's.
        seed: of everything random.
        device: where to align; the CPU if None.
        progress: say on stderr how far it is.
        options: of the method, if it is given by name.

    Returns:
        The path of the fused network, with alignment, structure and report.

    Raises:
        UsageError: arguments that make no sense together.
        CheckpointError: files that are missing, damaged or differ; an output that cannot be written, or is there
            already; an unfinished one of other settings, files, input or structure.
        FusionError: an integer tensor that differs between the networks and has no average.
        ModelError: the model cannot be built or traced without weights.
        StructureError: renumbering would change a network's function; nothing was averaged.

    Example:
        >>> import tempfile, torch, weldnet
        >>> from weldnet.checkpoints import save
        >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> folder = tempfile.mkdtemp()
        >>> for name in "ab":
        ...     save(make().state_dict(), f"{folder}/{name}.safetensors")
        >>> files = [f"{folder}/a.safetensors", f"{folder}/b.safetensors"]
        >>> x = torch.zeros(1, 4)
        >>> result = weldnet.fuse_files(files, x, model=make, out=f"{folder}/fused", progress=False)
        >>> sorted(weldnet.load(result.path))
        ['0.bias', '0.weight', '2.bias', '2.weight']
    """
    named = dict(files) if isinstance(files, Mapping) else dict(zip(_letters(files), files, strict=True))
    chosen, reason = _method(method, options, len(named))
    target = find_device(device)
    require_device(chosen, target)
    shares = _shares(weights, list(named))
    limit = parse_size(shard_size)
    meter = Meter(progress)
    weightless = _build(model)
    states = {name: StoredState(path).matched(weightless, name) for name, path in named.items()}
    config = {
        "method": repr(chosen),
        "outputs": outputs if outputs is None or isinstance(outputs, str) else list(outputs),
        "route": route,
        "weights": shares,
        "repair": "none",
        "check": check,
        "seed": seed,
        "shard_size": limit,
        "stream": True,
    }
    settings = {
        "version": __version__,
        "networks": list(named),
        **config,
        "method": chosen.name,
        "options": {option.name: getattr(chosen, option.name) for option in fields(chosen)},
        "files": {n: identity_of(s) for n, s in states.items()},
    }
    unfinished = Unfinished(Path(out), settings)
    _require_room(unfinished, states)
    with unfinished.opened():
        if unfinished.begun:
            meter.say(f"going on with {Path(out)}.unfinished")
        job = Job(unfinished, weightless, example_input, states, shares, config, meter)
        meter.step("read")
        metadata = unfinished.fact("provenance", lambda: job.scan(named))
        digests = unfinished.fact("parents", job.digests)
        meter.step("capture")
        structure = capture(weightless, example_input, outputs, route=route)
        unfinished.require("example input", _fingerprint(example_input))
        parts = [(name, type(module).__qualname__) for name, module in weightless.named_modules()]
        unfinished.require("model", f"{type(weightless).__name__} {_digest(str(parts))}")
        unfinished.require("structure", f"{len(structure.spaces)} spaces, {_digest(structure.to_json())}")
        job.refuse_unlike(structure)
        meter.step("check")
        proof = unfinished.fact("check", lambda: job.prove(structure)) if check else "not made (check=False)"
        meter.step("align")
        alignment = job.align(structure, chosen, target)
        meter.step("verify")
        errors = unfinished.fact("errors", lambda: job.verify(structure, alignment)) if check else {}
        meter.step("write")
        job.write(structure, alignment, metadata, limit, [Path(file) for file in companions])
        meter.close()
        unfinished.finish()
    report = Report(
        rows=(
            *(Row(n, "parent", {}, share, alignment.moved[n], errors.get(n)) for n, share in shares.items()),
            Row("fused", "fused"),
        ),
        method=f"{describe(chosen)} ({reason})" if reason else describe(chosen),
        repair="none: repairs need the networks in memory",
        objective=alignment.stats.get("objective"),
        check=proof,
        spaces=len(structure.spaces),
        free_share=structure.free_share,
        parameters=sum(parameter.numel() for parameter in weightless.parameters()),
        seconds=meter.seconds,
        notes=tuple(_notes(weightless, digests)),
    )
    return Streamed(unfinished.output, alignment, structure, report, config, digests, metadata)


def _notes(model: nn.Module, digests: Mapping[str, str]) -> Iterator[str]:
    if has_statistics(model):
        yield (
            "the network has BatchNorm statistics, which are only averaged here: expect it to be far worse than its "
            "parents until they are measured anew on a few hundred unlabelled inputs (in memory: data= or --data)."
        )
    yield from twins(digests)
    yield "not measured: the check is about renumbering, not quality."


def _method(
    method: str | AlignmentMethod, options: Mapping[str, Any], count: int
) -> tuple[WeightMatching | Gamf | Identity, str]:
    if count < 2:
        raise UsageError(f"fusing needs two networks or more; got {count}")
    choice = choose_auto(has_data=False) if method == "auto" else None
    chosen = make_method(method if choice is None else choice.method, **options)
    if not isinstance(chosen, _METHODS) or chosen.needs_data:
        what = f"{chosen.name} with activations" if isinstance(chosen, _METHODS) else chosen.name
        raise UsageError(f"{what} needs the networks in memory; with weights on disk there are {_NAMES}, without data")
    return chosen, "" if choice is None else f"auto: {choice.reason}"


def _build(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    return without_weights(model) if isinstance(model, nn.Module) else build_weightless(model)


def _shares(weights: Sequence[float] | Mapping[str, float] | None, names: Sequence[str]) -> dict[str, float]:
    if isinstance(weights, Mapping):
        unknown = sorted(set(weights) ^ set(names))
        if unknown:
            raise UsageError(f"weights and networks differ in {unknown[0]!r}; give one for each of {', '.join(names)}")
        weights = [weights[name] for name in names]
    return dict(zip(names, normalise_weights(weights, len(names)), strict=True))


def _letters(files: Sequence[PathLike]) -> list[str]:
    if isinstance(files, str | os.PathLike):
        raise UsageError(f"files is {str(files)!r}; give a list of checkpoints, or a dict of them by name")
    return [chr(ord("a") + i) if len(files) <= 26 else f"n{i}" for i in range(len(files))]


def _require_room(unfinished: Unfinished, states: Mapping[str, StoredState]) -> None:
    """Refuse at once what would fail after hours."""
    check_writable(unfinished.output)
    folder = next(f for f in unfinished.folder.parents if f.exists())
    done = sum(file.stat().st_size for file in unfinished.result.glob("*")) if unfinished.result.exists() else 0
    needed, free = next(iter(states.values())).nbytes - done, shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{str(unfinished.output)!r} needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB left; make "
            "room, or write elsewhere"
        )


def _fingerprint(example_input: Any) -> str:
    """Tell inputs apart by their values; those on the meta device, which have none, by shape and type."""
    leaves = {pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path(example_input)[0]}
    tensors = {n: leaf for n, leaf in leaves.items() if isinstance(leaf, Tensor) and not leaf.is_meta}
    rest = {n: _described(leaf) for n, leaf in leaves.items() if n not in tensors}
    return _digest(f"{tensors_sha256(tensors)} {sorted(rest.items())}")


def _described(leaf: object) -> str:
    if isinstance(leaf, Tensor):
        return f"{leaf.dtype} {tuple(leaf.shape)}"
    plain = isinstance(leaf, bool | int | float | complex | str | bytes | None)
    return repr(leaf) if plain else type(leaf).__qualname__  # another object may print its address


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
