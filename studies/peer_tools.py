"""weldnet, rebasin and Torch-Pruning behind one face: what may be renumbered, and a state dict renumbered at random.

Each tool is used as its documentation says. rebasin: ``PermutationCoordinateDescent`` is built on two networks, its
permutations are drawn at random instead of matched, and its own ``apply_permutations`` moves the weights.
Torch-Pruning claims which channels must be *removed* together, not that they may be renumbered: a group is read as
"these indices of these layers belong to channel r" (its ``root_idxs``), and channels are renumbered instead of removed.
As in its ``BasePruner``, grouped layers and heads are treated alike in every group, and attention is rooted downstream.
"""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from live import call
from torch import Tensor, nn
from torch.utils import _pytree as pytree

State = dict[str, Tensor]


@dataclass
class Found(ABC):
    """What a tool found in a model.

    Args:
        model: as the tool got it; not changed.
        seconds: how long finding took.
        notes: what the tool left out, with reasons.
    """

    model: nn.Module
    seconds: float = 0.0
    notes: Counter[str] = field(default_factory=Counter)

    @property
    @abstractmethod
    def sizes(self) -> list[float]:
        """log10 of the renumberings of every group."""

    @abstractmethod
    def renumbered(self, groups: Collection[int], generator: torch.Generator) -> State:
        """Return the model's state with the given groups renumbered at random, valid until the next call."""


# -- weldnet ---------------------------------------------------------------------------------------


class Weldnet(Found):
    """A group is a space with everything nested in it."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        import weldnet

        super().__init__(model)
        start = time.perf_counter()
        self.structure = weldnet.capture(model, example)
        self.seconds = time.perf_counter() - start

    @property
    def sizes(self) -> list[float]:
        tree = self.structure.tree
        return [sum(s.log10_renumberings for s in tree(root.name)) for root in self.structure.roots]

    def renumbered(self, groups: Collection[int], generator: torch.Generator) -> State:
        from weldnet.structure import random_renumbering, renumber

        roots = [self.structure.roots[g].name for g in groups]
        names = {space.name for root in roots for space in self.structure.tree(root)}
        drawn = random_renumbering(self.structure, generator)
        return renumber(self.model.state_dict(), self.structure, {name: drawn[name] for name in drawn if name in names})


# -- rebasin ---------------------------------------------------------------------------------------


class Rebasin(Found):
    """A group is one of rebasin's permutations.

    rebasin leaves batch-norm statistics to ``recalculate_batch_norms``, which needs data. With ``statistics`` set they
    move like the weights of their layer, as a perfect recalculation would have it.
    """

    statistics: bool = False

    def __init__(self, model: nn.Module, example: Any) -> None:
        from rebasin import PermutationCoordinateDescent

        super().__init__(model)
        self._twin, other = copy.deepcopy(model), copy.deepcopy(model)
        self._before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        start = time.perf_counter()
        descent = PermutationCoordinateDescent(other, self._twin, _positional(example))
        self._graph = descent.pinit.model_graph
        listed = {id(p): p for p, _ in self._graph.permutation_to_info} if len(self._graph) else {}
        self.seconds = time.perf_counter() - start
        self._permutations = [p for p in listed.values() if len(p) > 1]

    @property
    def sizes(self) -> list[float]:
        return [log10_factorial(len(p)) for p in self._permutations]

    def renumbered(self, groups: Collection[int], generator: torch.Generator) -> State:
        for number, permutation in enumerate(self._permutations):
            n = len(permutation)
            drawn = torch.randperm(n, generator=generator)
            permutation.perm_indices = drawn if number in groups else torch.arange(n)
        self._twin.load_state_dict(self._before)
        if len(self._graph):
            self._graph.apply_permutations()
        state = dict(self._twin.state_dict())
        return self._with_statistics(state) if self.statistics else state

    def _with_statistics(self, state: State) -> State:
        for name in [n for n in state if n.endswith("running_mean")]:
            layer = name.removesuffix("running_mean")
            before, after = self._before[f"{layer}weight"], state[f"{layer}weight"]
            source = before.argsort()[after.argsort().argsort()]  # random weights have no ties
            for buffer in (name, f"{layer}running_var"):
                state[buffer] = self._before[buffer][source]
        return state


def _positional(example: Any) -> Any:
    return list(example) if isinstance(example, tuple) else example


# -- Torch-Pruning ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Member:
    """Positions along one axis of some tensors that belong to each channel of a group."""

    tensors: tuple[tuple[str, int], ...]
    positions: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True)
class _Group:
    """Channels ``0 .. blocks * width``; channel j of every block moves alike, within a kind."""

    width: int
    blocks: int
    members: tuple[_Member, ...]

    def kinds(self) -> list[list[int]]:
        """Channels that have as many positions in every member: only these can change places."""
        found: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for unit in range(self.width):
            units = [unit + b * self.width for b in range(self.blocks)]
            found[tuple(len(m.positions.get(u, ())) for m in self.members for u in units)].append(unit)
        return [kind for kind in found.values() if len(kind) > 1]


class TorchPruning(Found):
    """A group is one of ``get_all_groups``; those that reach the network's output are left out, as its guide says."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        import torch_pruning as tp

        super().__init__(model)
        _plain_attention(model)
        self._names = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
        heads = _heads(model)
        last = _layers_at_the_output(model, example)
        start = time.perf_counter()
        graph = tp.DependencyGraph().build_dependency(model, example, output_transform=_values, verbose=False)
        roots = (tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR, tp.ops.TORCH_LSTM)
        raw = list(graph.get_all_groups(ignored_layers=last, root_module_types=roots))
        self.seconds = time.perf_counter() - start
        self._groups: list[_Group] = []
        for group in raw:
            try:
                self._groups.append(self._read(tp, graph, group, heads))
            except NotImplementedError as why:
                self.notes[str(why)] += 1

    @property
    def sizes(self) -> list[float]:
        return [sum(log10_factorial(len(kind)) for kind in group.kinds()) for group in self._groups]

    def renumbered(self, groups: Collection[int], generator: torch.Generator) -> State:
        state = dict(self.model.state_dict())
        for number in groups:
            group = self._groups[number]
            moves = _draw(group, generator)
            for member in group.members:
                for name, axis in member.tensors:
                    state[name] = _moved(state[name], axis, member.positions, moves)
        return state

    def _read(self, tp: Any, graph: Any, group: Any, heads: Mapping[nn.Module, int]) -> _Group:
        group = _rooted_downstream(tp, graph, group, heads)
        blocks, members = 1, []
        for item in group:
            dep, module = item.dep, item.dep.target.module
            outwards = graph.is_out_channel_pruning_fn(dep.handler)
            if isinstance(module, tp.ops._OutputOp):
                raise NotImplementedError("reaches the output")
            if not isinstance(module, nn.Module | nn.Parameter) or type(module).__module__.startswith("torch_pruning"):
                continue
            blocks = max(blocks, _blocks(graph, module, outwards, heads))
            tensors = self._tensors(graph, module, outwards, dep.target.pruning_dim)
            positions: dict[int, list[int]] = defaultdict(list)
            for index, root in zip(item.idxs, item.root_idxs, strict=True):
                positions[root].append(index)
            for tensor, axis, spread in tensors:
                members.append(_Member(((tensor, axis),), {r: spread(sorted(p)) for r, p in positions.items()}))
        channels = len(group[0].idxs)
        return _Group(channels // blocks, blocks, tuple(members))

    def _tensors(self, graph: Any, module: Any, outwards: bool, dim: int) -> list[tuple[str, int, Any]]:
        """Which axes of which tensors the tool's own pruning function for this layer cuts."""
        same = tuple
        if isinstance(module, nn.Parameter):
            return [(graph._param_to_name[module], dim % module.dim(), same)]
        name = lambda attribute: self._names[id(getattr(module, attribute))]  # noqa: E731
        has = [a for a in ("weight", "bias") if isinstance(getattr(module, a, None), nn.Parameter)]
        if isinstance(module, nn.modules.conv._ConvNd):
            depthwise = module.groups == module.out_channels and module.groups > 1
            if outwards or depthwise:
                return [(name(a), 1 if a == "weight" and module.transposed else 0, same) for a in has]
            width = module.in_channels // module.groups
            return [(name("weight"), 0 if module.transposed else 1, lambda p: tuple(i for i in p if i < width))]
        if isinstance(module, nn.Linear):
            return [(name(a), 0, same) for a in has] if outwards else [(name("weight"), 1, same)]
        if isinstance(module, nn.modules.batchnorm._NormBase):
            has += [a for a in ("running_mean", "running_var") if getattr(module, a) is not None]
            return [(name(a), 0, same) for a in has]
        if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.PReLU):
            return [(name(a), getattr(module, a).dim() - 1, same) for a in has]
        if isinstance(module, nn.Embedding):
            return [(name("weight"), 1, same)]
        if isinstance(module, nn.LSTM) and not outwards:
            inputs = [a for a, _ in module.named_parameters() if a.startswith("weight_ih_l0")]
            return [(name(a), 1, same) for a in inputs]
        if isinstance(module, nn.LSTM):
            raise NotImplementedError("its LSTM pruner takes one layer only")
        raise NotImplementedError(f"{type(module).__name__} not read")


def _draw(group: _Group, generator: torch.Generator) -> dict[int, int]:
    moves: dict[int, int] = {}
    for kind in group.kinds():
        order = torch.randperm(len(kind), generator=generator).tolist()
        for unit, source in zip(kind, (kind[o] for o in order), strict=True):
            moves |= {unit + b * group.width: source + b * group.width for b in range(group.blocks)}
    return moves


def _moved(tensor: Tensor, axis: int, positions: Mapping[int, tuple[int, ...]], moves: Mapping[int, int]) -> Tensor:
    index = torch.arange(tensor.shape[axis])
    for unit, source in moves.items():
        if unit in positions:
            index[list(positions[unit])] = torch.tensor(positions[source], dtype=torch.int64)
    return tensor.index_select(axis, index)


def _rooted_downstream(tp: Any, graph: Any, group: Any, heads: Mapping[nn.Module, int]) -> Any:
    """Take the layer after attention as the root, as BasePruner does."""
    attention = any(i.dep.source.module in heads and graph.is_out_channel_pruning_fn(i.dep.handler) for i in group)
    roots = (tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR, tp.ops.TORCH_LSTM)
    inwards = [
        i for i in group if isinstance(i.dep.target.module, roots) and graph.is_in_channel_pruning_fn(i.dep.handler)
    ]
    if not attention or not inwards:
        return group
    last = inwards[-1]
    return graph.get_pruning_group(last.dep.target.module, last.dep.handler, last.idxs)


def _blocks(graph: Any, module: Any, outwards: bool, heads: Mapping[nn.Module, int]) -> int:
    if not isinstance(module, nn.Module):
        return 1
    if outwards and module in heads:
        return heads[module]
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.out_channels:
        return 1
    pruner = graph.get_pruner_of_module(module)
    return (pruner.get_out_channel_groups if outwards else pruner.get_in_channel_groups)(module)


def _heads(model: nn.Module) -> dict[nn.Module, int]:
    return {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}


def _plain_attention(model: nn.Module) -> None:
    """Its guide for timm: no fused attention kernel."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def _layers_at_the_output(model: nn.Module, example: Any) -> list[nn.Module]:
    """The layers whose output is the network's: its guide says to ignore them."""
    seen: list[tuple[nn.Module, Any]] = []
    hooks = [m.register_forward_hook(lambda m, _, out: seen.append((m, out))) for m in model.modules()]
    answers = {id(t) for t in pytree.tree_leaves(_values(call(model, example))) if isinstance(t, Tensor)}
    for hook in hooks:
        hook.remove()
    return [m for m, out in seen if isinstance(out, Tensor) and id(out) in answers]


def _values(answer: Any) -> Any:
    return list(answer.values()) if isinstance(answer, Mapping) else answer


def log10_factorial(n: int) -> float:
    """The base-10 logarithm of n!."""
    return math.lgamma(n + 1) / math.log(10)


TOOLS: dict[str, Callable[[nn.Module, Any], Found]] = {
    "weldnet": Weldnet,
    "rebasin": Rebasin,
    "Torch-Pruning": TorchPruning,
}
