"""The steps of a fusion from disk to disk; each gives the same when it is done again."""

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

from weldnet.alignment import Alignment, AlignmentMethod, Problem, Workspace
from weldnet.assignment import Permutation
from weldnet.checkpoints import (
    Entry,
    StoredState,
    atomic_path,
    plan_shards,
    provenance,
    shard_names,
    tensors_sha256,
    validate_finite,
    write_index,
    write_shard,
)
from weldnet.errors import CheckpointError, StructureError
from weldnet.fusion import average
from weldnet.streaming._meter import Meter
from weldnet.streaming._unfinished import Unfinished
from weldnet.structure import Check, StoredReferee, Structure, random_renumbering, renumber

__all__ = ["Job", "PathLike"]

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Job:
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

    def refuse_unlike(self, structure: Structure) -> None:
        """Refuse integer tensors that have no average now, and not when everything else is done."""
        for name, where in next(iter(self.states.values())).stored.items():
            if not (where.dtype.is_floating_point or where.dtype.is_complex or structure.places_in(name)):
                average([{name: state[name]} for state in self.states.values()], list(self.shares.values()))

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
    ) -> None:
        """Average tensor by tensor into shards; those that are there already are kept."""
        first = next(iter(self.states.values()))
        entries = {name: (where.dtype, where.shape) for name, where in first.stored.items()}
        shards = plan_shards(entries, limit)
        self.meter.begin(f"{len(shards)} files", sum(state.nbytes for state in self.states.values()))
        sources = {network: _sources(alignment, network) for network in self.states}
        folder = self.unfinished.result
        for file, names in zip(shard_names(len(shards)), shards, strict=True):
            chosen = {name: entries[name] for name in names}
            if _is_whole(folder / file, chosen):
                self.meter.read(sum(first.where[n].nbytes for n in names) * len(self.states))
                continue
            write_shard(folder / file, chosen, lambda name: self._mean(name, structure, sources), metadata)
        if len(shards) > 1:
            write_index(folder, shards, entries)
        for source in companions:
            with atomic_path(folder / source.name) as temporary:
                shutil.copyfile(source, temporary)
        # After the companions: a parent that is a fused network itself has such a file of its own.
        document = {key: _parsed(value) for key, value in metadata.items()}
        with atomic_path(folder / "weldnet.json") as temporary:
            temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    def _mean(self, name: str, structure: Structure, sources: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """Return what :func:`weldnet.fusion.average` gives, bit for bit, with one network's tensor held at a time."""

        def carried(network: str) -> Tensor:
            tensor = self.states[network][name]
            self.meter.read(tensor.nbytes)
            return renumber({name: tensor}, structure, sources[network])[name]

        where = next(iter(self.states.values())).stored[name]
        if not where.dtype.is_floating_point:
            return average([{name: carried(network)} for network in self.states], list(self.shares.values()))[name]
        total = torch.zeros(where.shape, dtype=torch.float64)
        for network, share in self.shares.items():
            total.add_(carried(network), alpha=share)
        return total.to(where.dtype)


def _is_whole(file: Path, entries: Mapping[str, Entry]) -> bool:
    """Whether a shard is there, as long as its header says, and holds these tensors."""
    try:
        found = StoredState(file).where
    except CheckpointError:
        return False
    return {name: (where.dtype, where.shape) for name, where in found.items()} == dict(entries)


def _sources(alignment: Alignment, network: str) -> dict[str, Tensor]:
    """The methods here end in permutations."""
    return {space: c.source for space, c in alignment[network].items() if isinstance(c, Permutation)}


def _parsed(text: str) -> Any:
    """Metadata of weights are texts, some of which are JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text
