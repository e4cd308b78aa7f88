"""Broken engines: every one is caught by a random network, so the properties are worth something."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fuzz_properties import judge
from random_networks import Spec, specs
from test_structure_fuzz import BLOCKS, EXAMPLES
from weldnet.structure import _forest, _spec, _units
from weldnet.structure._units import Factor, Units, Value
from weldnet.structure.rules import _contraction, _movement, _normalisation, _reduction, _table

Patch = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Mutant:
    """A wrong engine, and the steps whose networks are tried first."""

    patch: Patch
    steps: tuple[str, ...]


@pytest.fixture(scope="module")
def networks() -> list[Spec]:
    """The networks that the fuzzer tries in every test run."""
    found: list[Spec] = []
    for block in range(BLOCKS):

        @seed(block)
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.one_of(specs(tiny=True), specs(tiny=False)))
        def collect(spec: Spec) -> None:
            found.append(spec)

        collect()
    return found


# -- ways to be wrong ----------------------------------------------------------------------------------


def rule(name: str, mutant: Callable[..., Any]) -> Patch:
    """Give an operation another rule; it gets the right one as its first argument."""

    def patch(to: pytest.MonkeyPatch) -> None:
        right = _table.FAMILIES.get(f"aten.{name}", _table.pointwise)
        to.setitem(_table.FAMILIES, f"aten.{name}", lambda context, op: mutant(right, context, op))

    return patch


def function(module: Any, name: str, mutant: Callable[..., Any]) -> Patch:
    """Replace a function; the mutant gets the right one as its first argument."""

    def patch(to: pytest.MonkeyPatch) -> None:
        right = getattr(module, name)
        to.setattr(module, name, lambda *args, **kwargs: mutant(right, *args, **kwargs))

    return patch


def several(*patches: Patch) -> Patch:
    return lambda to: [patch(to) for patch in patches] and None


def first_only(right: Any, context: Any, op: Any) -> list[Value]:
    """The result has the units of the first operand: nothing ties the others."""
    value = _units.broadcast(context.value(op.inputs[0]), op.outputs[0].shape)
    return [replace(value, leaf=None), *(Value(ref.shape) for ref in op.outputs[1:])]


def never_unite(right: Any, units: Units, a: Any, b: Any) -> bool:
    return True


def one_label(right: Any, units: Units, source: Any, target: Any, *tags: Any) -> None:
    """Relations of all events have the same label."""
    units._labels = 0
    right(units, source, target)
    units._labels = 0


def no_tags(right: Any, units: Units, source: Any, target: Any, *tags: Any) -> None:
    right(units, source, target)


def turned(right: Any, positions: Any) -> Any:
    """Units and copies change roles."""
    units, copies = positions.shape
    return right(positions.reshape(copies, units).T if copies > 1 else positions)


def shifted(right: Any, units: Units, operands: Any, sources: Any) -> Value:
    """A concatenation or a view is off by one along its last axis."""
    return right(units, operands, np.roll(sources, 1, -1) if sources.ndim else sources)


def shifted_joins(right: Any, context: Any, op: Any) -> list[Value]:
    """The second of two joined parts starts one too early."""
    swapped = replace(op, args=([*op.args[0][::-1]], *op.args[1:]))
    return right(context, swapped)


def flatten_turned(right: Any, context: Any, value: Value, shape: tuple[int, ...]) -> Value:
    """A reshape that changes the number of axes counts its inner axis first."""
    made = right(context, value, shape)
    factors = []
    for factor in made.factors:
        turn = len(factor.axes) == 2 and factor.units.shape[0] == factor.units.shape[1]
        factors.append(Factor(factor.axes, factor.units.T.copy(), None) if turn else factor)
    return replace(made, factors=tuple(factors))


def children_first(right: Any, bundles: Any, aligned: Any, parents: Any) -> Any:
    """Units of nested spaces keep their order instead of going into their parent's blocks."""
    return [replace(b, classes={c: aligned[c] for c in b.classes}) for b in right(bundles, aligned, parents)]


def unpinned_rows(right: Any, context: Any, op: Any) -> list[Value]:
    """The rows of a table may move although words come with the input."""
    columns = _units.reduce(context.units, context.value(op.inputs[0]), {0}).factors
    shape = op.outputs[0].shape
    return [Value(shape, tuple(f.moved([len(shape) - 1]) for f in columns))]


def as_constant_order(right: Any, context: Any, op: Any) -> list[Value]:
    """A constant index counts as the identity."""
    value = context.value(op.inputs[0])
    return [replace(value, leaf=None)] if value.shape == op.outputs[0].shape else right(context, op)


def dense(right: Any, context: Any, op: Any) -> list[Value]:
    """A grouped convolution counts as a pointwise change of its input."""
    if int(op.args[8]) == 1 or op.outputs[0].shape != op.inputs[0].shape:
        return right(context, op)
    return [replace(context.value(op.inputs[0]), leaf=None)]


def unwritten(right: Any, context: Any, ref: Any, written: Any) -> Value:
    return context.value(ref)


def no_pins(right: Any, units: Units, members: Any, reason: str) -> None:
    return None


def pins_without(reason: str) -> Callable[..., None]:
    return lambda right, units, members, why: None if why.startswith(reason) else right(units, members, why)


def everything_pinned(right: Any, units: Units, members: Any, reason: str) -> None:
    right(units, np.arange(len(units)), reason)


def unrelated_blocks(right: Any, units: Units, fine: Any, coarse: Any) -> None:
    return None


def reduced_apart(right: Any, units: Units, value: Value, axes: Any) -> Value:
    """A reduction forgets that what it sums over was there, and what is left keeps its first units."""
    gone = set(axes)
    kept = []
    for factor in value.factors:
        rest = [i for i, a in enumerate(factor.axes) if a not in gone]
        if len(rest) == len(factor.axes):
            kept.append(factor)
    shape = tuple(1 if a in gone else n for a, n in enumerate(value.shape))
    return Value(shape, tuple(kept), value.uniform - gone, why=value.why)


def freezes(right: Any, context: Any, op: Any) -> None:
    """No rule: sound, but not complete."""


def passes(right: Any, context: Any, op: Any) -> list[Value]:
    """An operation that needs the order counts as pointwise."""
    return _table.pointwise(context, op)


def window_passes(right: Any, context: Any, value: Value, axes: Any, reason: str) -> Any:
    return value.factors


def mark_nothing(right: Any, units: Units, factor: Factor, where: Any) -> None:
    return None


MUTANTS: dict[str, Mutant] = {
    "a sum ties nothing": Mutant(rule("add", first_only), ("add", "residual")),
    "a product ties nothing": Mutant(rule("mul", first_only), ("multiply", "gate")),
    "equal units are not united": Mutant(function(Units, "unite", never_unite), ("residual", "add")),
    "batch norm forgets its statistics": Mutant(
        several(
            *(rule(n, first_only) for n in ("native_batch_norm", "batch_norm", "_native_batch_norm_legit_no_training"))
        ),
        ("batch norm",),
    ),
    "layer norm forgets its weights": Mutant(
        several(rule("native_layer_norm", first_only), rule("layer_norm", first_only)), ("layer norm",)
    ),
    "group norm ignores its groups": Mutant(rule("native_group_norm", first_only), ("group norm",)),
    "all relations have one label": Mutant(function(Units, "relate", one_label), ("attention", "gate")),
    "copies are not told apart": Mutant(function(Units, "relate", no_tags), ("concatenate", "flat scale")),
    "units and copies change roles in a layout": Mutant(
        function(_spec.Layout, "of", staticmethod(turned)), ("attention",)
    ),
    "data moves one too far": Mutant(
        several(function(_units, "move_data", shifted), function(_movement, "move_data", shifted)), ("shuffle", "fold")
    ),
    "joined parts change places": Mutant(rule("cat", shifted_joins), ("concatenate",)),
    "a view counts its inner axis first": Mutant(
        several(*(function(m, "reshape", flatten_turned) for m in (_movement, _contraction, _normalisation))),
        ("attention", "group norm", "shuffle"),
    ),
    "nested units are not in their parent's blocks": Mutant(
        function(_forest, "_in_order", children_first), ("strided heads",)
    ),
    "the rows of an embedding may move": Mutant(rule("embedding", unpinned_rows), ("embedding",)),
    "a constant index is the identity": Mutant(
        several(rule("index", as_constant_order), rule("index_select", as_constant_order)), ("constant index",)
    ),
    "a grouped convolution is pointwise": Mutant(rule("convolution", dense), ("grouped",)),
    "a write into a view is ignored": Mutant(
        function(_table, "_overwritten", unwritten), ("in place", "in place again")
    ),
    "nothing is pinned": Mutant(function(Units, "pin", no_pins), ()),
    "outputs are not pinned": Mutant(function(Units, "pin", pins_without("network output")), ()),
    "kernel positions are not pinned": Mutant(
        function(Units, "pin", pins_without("kernel position")), ("convolution",)
    ),
    "what is joined with an input is not pinned": Mutant(
        function(Units, "pin", pins_without("joined")), ("concatenate",)
    ),
    "everything is pinned": Mutant(function(Units, "pin", everything_pinned), ()),
    "blocks do not move with their units": Mutant(function(_units, "_relate_blocks", unrelated_blocks), ("attention",)),
    "softmax is pointwise": Mutant(rule("_softmax", passes), ("shuffle",)),
    "a reduction forgets what it reduces": Mutant(
        several(*(function(m, "reduce", reduced_apart) for m in (_reduction, _contraction))), ("half mean", "attention")
    ),
    "sorting is pointwise": Mutant(several(rule("sort", passes), rule("cumsum", passes)), ("ordered",)),
    "windows do not pin": Mutant(function(_contraction, "fixed_across", window_passes), ("convolution", "table")),
    "picked units are not told from the rest": Mutant(function(_units, "_mark_part", mark_nothing), ("half mean",)),
    "products freeze": Mutant(rule("mm", freezes), ("product", "linear")),
    "transposing freezes": Mutant(several(rule("transpose", freezes), rule("t", freezes)), ("linear",)),
    "gates freeze": Mutant(rule("glu", freezes), ("gate",)),
}


def caught(networks: list[Spec], first: tuple[str, ...]) -> Iterator[str]:
    """Judge networks until there is a fault; a crash is a fault too."""
    for spec in sorted(networks, key=lambda spec: not any(step.name in first for step in spec.steps)):
        try:
            verdict = judge(spec)
        except Exception as error:
            yield f"crash: {error!r}"
            continue
        if verdict is not None and verdict.faults:
            yield from verdict.faults


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_engine_is_caught(name: str, networks: list[Spec], monkeypatch: pytest.MonkeyPatch):
    MUTANTS[name].patch(monkeypatch)
    fault = next(caught(networks, MUTANTS[name].steps), None)
    assert fault is not None, f"no network of {len(networks)} shows that {name}"


def test_the_right_engine_is_not(networks: list[Spec]):
    assert len(networks) >= 0.9 * BLOCKS * EXAMPLES
    assert next(caught(networks[:40], ()), None) is None
    assert torch.is_grad_enabled()
