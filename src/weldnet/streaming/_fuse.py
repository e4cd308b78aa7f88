"""Fuse from disk to disk: tensors are read when they are needed, and no network is ever in memory whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weldnet._arrays import find_device
from weldnet.alignment import (
    Alignment,
    AlignmentMethod,
    Gamf,
    Identity,
    Problem,
    WeightMatching,
    Workspace,
    choose_auto,
    describe,
    make_method,
)
from weldnet.assignment import Permutation
from weldnet.checkpoints import (
    StoredState,
    atomic_path,
    check_writable,
    parse_size,
    plan_shards,
    provenance,
    shard_names,
    tensors_sha256,
    validate_finite,
    write_index,
    write_shard,
)
from weldnet.errors import CheckpointError, StructureError, UsageError
from weldnet.fusion import Report, Row, average, normalise_weights
from weldnet.streaming._meter import Meter
from weldnet.streaming._streamed import Streamed
from weldnet.streaming._unfinished import Unfinished, identity_of
from weldnet.structure import (
    Check,
    StoredReferee,
    Structure,
    build_weightless,
    capture,
    random_renumbering,
    renumber,
    without_weights,
)

__all__ = ["fuse_files"]

#: Methods that go on from what a workspace kept, and read tensors place by place.
_METHODS = (WeightMatching, Gamf, Identity)
_NAMES = "weight_matching, gamf, identity"

PathLike = str | os.PathLike[str]


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
            already; an unfinished one of other settings.
        ModelError: the model cannot be built or traced without weights.
        StructureError: renumbering would change a network's function; nothing was averaged.

    Example:
        >>> import tempfile, torch, weldnet
        >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> folder = tempfile.mkdtemp()
        >>> for name in "ab":
        ...     weldnet.checkpoints.save(make().state_dict(), f"{folder}/{name}.safetensors")
        >>> files = [f"{folder}/a.safetensors", f"{folder}/b.safetensors"]
        >>> x = torch.zeros(1, 4)
        >>> result = weldnet.fuse_files(files, x, model=make, out=f"{folder}/fused", progress=False)
        >>> sorted(weldnet.load(result.path))
        ['0.bias', '0.weight', '2.bias', '2.weight']
    """
    named = dict(files) if isinstance(files, Mapping) else dict(zip(_letters(files), files, strict=True))
    chosen, reason = _method(method, options, len(named))
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
    unfinished = Unfinished(Path(out), {**config, "files": {n: identity_of(s) for n, s in states.items()}})
    _require_room(unfinished, states)
    with unfinished.opened():
        job = _Job(unfinished, weightless, example_input, states, shares, config, meter)
        meter.step("read")
        metadata = unfinished.fact("provenance", lambda: job.scan(named))
        digests = unfinished.fact("parents", job.digests)
        meter.step("capture")
        structure = capture(weightless, example_input, outputs, route=route)
        meter.step("check")
        proof = unfinished.fact("check", lambda: job.prove(structure)) if check else "not made (check=False)"
        meter.step("align")
        alignment = job.align(structure, chosen, find_device(device))
        meter.step("verify")
        errors = unfinished.fact("errors", lambda: job.verify(structure, alignment)) if check else {}
        meter.step("write")
        entries = job.write(structure, alignment, metadata, limit, [Path(file) for file in companions])
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
        parameters=sum(where.numel for where in entries.values()),
        seconds=meter.seconds,
    )
    return Streamed(unfinished.output, alignment, structure, report, config, digests, metadata)


@dataclass(frozen=True)
class _Job:
    """The steps of one fusion; each gives the same when it is done again."""

    unfinished: Unfinished
    model: nn.Module
    example_input: Any
    states: Mapping[str, StoredState]
    shares: Mapping[str, float]
    config: Mapping[str, Any]
    meter: Meter
    referees: dict[str, StoredReferee] = field(default_factory=dict[str, StoredReferee])

    def scan(self, files: Mapping[str, PathLike]) -> dict[str, str]:
        """Refuse NaN and Inf; return where the fused network comes from."""
        for name, state in self.states.items():
            self.meter.begin(f"is {name} finite?", state.nbytes)
            for key in state.stored:
                tensor = state[key]
                validate_finite({key: tensor}, name)
                self.meter.read(tensor.nbytes)
        self.meter.begin("fingerprints of the files", 0)
        return provenance(list(files.values()), self.config, self.config["seed"])

    def digests(self) -> dict[str, str]:
        """Return a SHA-256 of each network's tensors."""
        self.meter.begin("fingerprints of the tensors", 0)
        return {name: tensors_sha256(state) for name, state in self.states.items()}

    def prove(self, structure: Structure) -> str:
        """Renumber every network at random; its outputs must stay."""
        if not structure.spaces:
            return str(Check(0.0, 0.0, 0, 0))
        sources = random_renumbering(structure, torch.Generator().manual_seed(self.config["seed"]))
        worst = max(
            (self._change(name, structure, sources, "renumbered at random") for name in self.states),
            key=lambda found: found[0],
        )
        return f"{Check(*worst, 1, 1)}; weights read from disk"

    def verify(self, structure: Structure, alignment: Alignment) -> dict[str, float]:
        """Return by how much the alignment changes every network's outputs: rounding."""
        errors: dict[str, float] = {}
        for name in self.states:
            errors[name] = self._change(name, structure, _sources(alignment, name), "renumbered along the alignment")[0]
        return errors

    def _change(self, name: str, structure: Structure, sources: Mapping[str, Tensor], what: str) -> tuple[float, float]:
        state = self.states[name]
        if name not in self.referees:
            self.meter.begin(f"{name} as it is", state.nbytes)
            self.referees[name] = StoredReferee(self.model, self.example_input, structure, self._counted(state))
        referee = self.referees[name]
        self.meter.begin(f"{name} {what}", state.nbytes)
        error = referee.error(sources)
        if not error <= referee.tolerance:
            raise StructureError(
                f"{name!r} {what} answers otherwise: {error:.1e} (relative, {referee.tolerance:.0e} allowed); nothing "
                "was averaged: weldnet check on a smaller network of this class names the tensor"
            )
        return error, referee.tolerance

    def _counted(self, state: StoredState) -> Callable[[str], Tensor]:
        def read(name: str) -> Tensor:
            tensor = state[name]
            self.meter.read(tensor.nbytes)
            return tensor

        return read

    def align(self, structure: Structure, method: AlignmentMethod, device: torch.device | None) -> Alignment:
        """Return the alignment, found now or by an earlier process."""
        file = self.unfinished.alignment
        if not file.exists():
            workspace = Workspace(
                self.unfinished.workspace, device=device, begin=self.meter.begin, read=self.meter.read
            )
            problem = Problem(structure, self.states, self.config["seed"], device, workspace=workspace)
            with torch.no_grad():
                method(problem).save(file)
            shutil.rmtree(self.unfinished.workspace, ignore_errors=True)
        return Alignment.load(file)

    def write(
        self,
        structure: Structure,
        alignment: Alignment,
        metadata: Mapping[str, str],
        limit: int,
        companions: Sequence[Path],
    ) -> dict[str, Any]:
        """Average tensor by tensor into shards; those that are there already are kept."""
        first = next(iter(self.states.values()))
        entries = {name: (where.dtype, where.shape) for name, where in first.stored.items()}
        shards = plan_shards(entries, limit)
        self.meter.begin(f"{len(shards)} files", sum(state.nbytes for state in self.states.values()))
        sources = {network: _sources(alignment, network) for network in self.states}
        folder = self.unfinished.result
        for file, names in zip(shard_names(len(shards)), shards, strict=True):
            chosen = {name: entries[name] for name in names}
            if (folder / file).exists():
                self.meter.read(sum(first.where[n].nbytes for n in names) * len(self.states))
                continue
            write_shard(folder / file, chosen, lambda name: self._mean(name, structure, sources), metadata)
        if len(shards) > 1:
            write_index(folder, shards, entries)
        document = {key: _parsed(value) for key, value in metadata.items()}
        with atomic_path(folder / "weldnet.json") as temporary:
            temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        for source in companions:
            with atomic_path(folder / source.name) as temporary:
                shutil.copyfile(source, temporary)
        return dict(first.stored)

    def _mean(self, name: str, structure: Structure, sources: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        states: list[dict[str, Tensor]] = []
        for network, state in self.states.items():
            tensor = state[name]
            self.meter.read(tensor.nbytes)
            states.append({name: renumber({name: tensor}, structure, sources[network])[name]})
        return average(states, list(self.shares.values()))[name]


def _sources(alignment: Alignment, network: str) -> dict[str, Tensor]:
    """The methods here end in permutations."""
    return {space: c.source for space, c in alignment[network].items() if isinstance(c, Permutation)}


def _method(method: str | AlignmentMethod, options: Mapping[str, Any], count: int) -> tuple[AlignmentMethod, str]:
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


def _parsed(text: str) -> Any:
    """Metadata of weights are texts, some of which are JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


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
