"""Steps: the layers of an averaged network in the order in which they run, and the parents beside each of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from weldnet.activations import Layer, carry_channels, find_layers, observed, run
from weldnet.fusion._averaged import Averaged
from weldnet.structure import Structure

__all__ = ["Bench", "Call", "Step"]


@final
@dataclass(frozen=True)
class Step:
    """What is mended at once: an affine layer with the BatchNorm that reads its output, or one of them alone.

    Args:
        affine: the affine layer, or None.
        norm: the BatchNorm with running statistics, or None.
        calls: how often the network calls it in one pass.
        rectified: whether a ReLU is all that reads its output.
    """

    affine: Layer | None
    norm: Layer | None
    calls: int = 1
    rectified: bool = False

    @property
    def last(self) -> Layer:
        """The layer at whose output the parents are compared."""
        layer = self.norm or self.affine
        assert layer is not None
        return layer

    @property
    def name(self) -> str:
        """Path of the module that comes first."""
        return (self.affine or self.last).name


@final
@dataclass(frozen=True)
class Call:
    """One call of a step.

    Args:
        given: what its first module was given.
        inner: what its norm was given, as rows; what its affine layer gave, if there is no norm.
        out: what its last module gave, shape (rows, channels).
    """

    given: Tensor
    inner: Tensor
    out: Tensor


@final
class Bench:
    """A network under repair, with its parents beside it on the same inputs.

    Args:
        averaged: the average and where it comes from; not changed.
        model: what is mended: a copy of the averaged network.
    """

    def __init__(self, averaged: Averaged, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self.shares = {name: share for name, share in averaged.shares.items() if share > 0}
        self._averaged = averaged
        self._layers = {layer.name: layer for layer in find_layers(model, averaged.structure)}
        self._parents = {
            name: {x.name: x for x in find_layers(averaged.parents[name], self._structure(name))}
            for name in self.shares
        }

    def steps(self, inputs: Tensor) -> tuple[Step, ...]:
        """Return what one pass calls, in the order of first calls.

        Layers that share a tensor with another module are left out, as are those that are not called as modules.
        """
        readers = _Readers()
        order: dict[str, Layer] = {}
        calls: Counter[str] = Counter()
        outputs: list[tuple[Layer, _Value]] = []
        partner: dict[str, str] = {}

        def visit(layer: Layer, given: Tensor, out: Tensor) -> None:
            order.setdefault(layer.name, layer)
            calls[layer.name] += 1
            before = next((x for x, value in outputs if value == _value(given)), None)
            if before is not None and before.kind == "affine":
                partner[layer.name] = before.name
            outputs.append((layer, _value(out)))
            readers.keep(out)

        with ExitStack() as stack:
            stack.enter_context(observed(self.model, list(self._layers.values()), visit))
            stack.enter_context(readers)
            run(self.model, inputs)
        own = [x for x in order.values() if self._is_own(x)]
        norms = {x.name: x for x in own if self._keeps_statistics(x)}
        follower = {partner[n]: x for n, x in norms.items() if n in partner and calls[n] == calls[partner[n]]}
        followers = {x.name for x in follower.values()}
        rectified = {n: all(readers.is_rectified(v) for x, v in outputs if x.name == n) for n in order}
        steps = []
        for layer in own:
            if layer.kind == "affine":
                norm = follower.get(layer.name)
                steps.append(Step(layer, norm, calls[layer.name], rectified[(norm or layer).name]))
            elif layer.name in norms and layer.name not in followers:
                steps.append(Step(None, layer, calls[layer.name], rectified[layer.name]))
        return tuple(steps)

    def own(self, step: Step, inputs: Tensor) -> list[Call]:
        """Run the network under repair up to a step's last call."""
        pending: list[tuple[Tensor, Tensor]] = []
        seen: list[Call] = []

        def visit(layer: Layer, given: Tensor, out: Tensor) -> None:
            if step.affine is not None and step.norm is not None and layer.name == step.affine.name:
                pending.append((given.clone() if step.calls > 1 else given, layer.rows(out)))
                return
            first, inner = pending.pop(0) if pending else (given, layer.rows(out if step.norm is None else given))
            # Copies where the pass goes on, for a later operation may write into what was seen.
            seen.append(
                Call(first, inner, layer.rows(out)) if step.calls == 1 else _copy(first, inner, layer.rows(out))
            )
            if len(seen) == step.calls:
                raise _Reached

        with observed(self.model, [x for x in (step.affine, step.norm) if x is not None], visit):
            _run_until(self.model, inputs)
        return seen

    def parents(self, step: Step, inputs: Tensor) -> dict[str, Tensor]:
        """Return each parent's outputs at a step, carried to the universe: shape (rows, channels).

        Rows of several calls come one call after the other.
        """
        return {name: self._rows_of(name, step, inputs) for name in self.shares}

    def mean(self, rows: Mapping[str, Tensor], step: Step) -> Tensor:
        """Return the parents' mean by their shares; at a unit that some of them have, the mean of those.

        It is written as the first parent and what the others differ by, so that equal parents give their very value.
        """
        first, *others = self.shares
        total = rows[first].clone()
        owned = self._owned(step)
        if owned is not None:
            shares = {name: owned[name].to(total.device) * share for name, share in self.shares.items()}
            whole = torch.stack(list(shares.values())).sum(0)
            total.mul_((shares[first] / whole).to(total.dtype))
            for name in others:
                total.add_(rows[name].to(total.device, total.dtype) * (shares[name] / whole).to(total.dtype))
            return total
        for name in others:
            total.add_(rows[name].to(total.device, total.dtype) - rows[first], alpha=self.shares[name])
        return total

    def _owned(self, step: Step) -> dict[str, Tensor] | None:
        """Which channels of a step each parent has, by 1 and 0; None if each of them has all."""
        owned: dict[str, Tensor] = {}
        for name in self.shares:
            layer = self._parents[name][step.last.name]
            owned[name] = self._carried(name, layer, step, torch.ones(1, layer.channels, dtype=torch.float64))[0]
        return None if all(bool((o > 0).all()) for o in owned.values()) else {n: o.sign() for n, o in owned.items()}

    def _rows_of(self, name: str, step: Step, inputs: Tensor) -> Tensor:
        layer = self._parents[name][step.last.name]
        rows: list[Tensor] = []

        def visit(layer: Layer, given: Tensor, out: Tensor) -> None:
            rows.append(layer.rows(out).clone())
            if len(rows) == step.calls:
                raise _Reached

        parent = self._averaged.parents[name]
        with observed(parent, [layer], visit):
            _run_until(parent, inputs)
        return self._carried(name, layer, step, torch.cat(rows))

    def _carried(self, name: str, layer: Layer, step: Step, rows: Tensor) -> Tensor:
        goal = (step.last.places, self._averaged.structure, step.last.channels)
        couplings = self._averaged.alignment.couplings.get(name, {})
        return carry_channels(rows, layer.places, self._structure(name), couplings, goal)

    def _structure(self, name: str) -> Structure:
        return self._averaged.structures.get(name, self._averaged.structure)

    def _is_own(self, layer: Layer) -> bool:
        """Whether no other module has the layer's tensors."""
        mine = {id(t) for t in self.modules[layer.name].parameters(recurse=False)}
        others = (module for name, module in self.modules.items() if name != layer.name)
        return not any(id(t) in mine for module in others for t in module.parameters(recurse=False))

    def _keeps_statistics(self, layer: Layer) -> bool:
        module = self.modules[layer.name]
        return isinstance(module, _BatchNorm) and module.running_mean is not None


def _copy(*parts: Tensor) -> Call:
    return Call(*(part.clone() for part in parts))


class _Reached(Exception):  # noqa: N818
    """The pass has come as far as it is needed."""


def _run_until(model: nn.Module, inputs: Tensor) -> None:
    try:
        run(model, inputs)
    except _Reached:
        return


# -- what reads a tensor ---------------------------------------------------------------------------

#: A tensor at one time: operations in place make another one of it.
_Value = tuple[int, int]

_RECTIFIERS = frozenset({"aten::relu", "aten::relu_"})


def _value(tensor: Tensor) -> _Value:
    return id(tensor), tensor._version


class _Readers(TorchDispatchMode):
    """Records which operations read which tensors of one pass."""

    def __init__(self) -> None:
        super().__init__()
        self._by_value: dict[_Value, list[str]] = defaultdict(list)
        self._kept: list[Tensor] = []  # an identity is given again once its tensor is gone

    def keep(self, tensor: Tensor) -> None:
        self._kept.append(tensor)

    def is_rectified(self, value: _Value) -> bool:
        """Whether something reads the value, and that only to rectify it."""
        names = self._by_value.get(value, [])
        return bool(names) and all(name in _RECTIFIERS for name in names)

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        for part in pytree.tree_leaves((args, kwargs or {})):
            if isinstance(part, Tensor):
                self._by_value[_value(part)].append(func._schema.name)
                self._kept.append(part)
        return func(*args, **(kwargs or {}))
