"""Random networks: what capture declares free is free, every place counts, and nothing that is free is missing."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fuzz_properties import Orders, count_renumberings, generalised, judge
from random_networks import RandomNetwork, Spec, Step, specs

BLOCKS, EXAMPLES = 12, 25


@pytest.mark.parametrize("block", range(BLOCKS))
def test_random_networks_are_captured_soundly_with_power_and_completely(block: int):
    """Many short runs: one long run of hypothesis repeats itself."""

    @seed(block)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(specs(tiny=True), specs(tiny=False)))
    def run(spec: Spec) -> None:
        verdict = judge(spec)
        assert verdict is None or not verdict.faults, f"{spec}\n{spec!r}\n{verdict.faults}\n{verdict.structure}"

    run()


# -- the fuzzer itself ---------------------------------------------------------------------------------


def test_a_spec_decides_its_network_and_reads_as_a_program():
    spec = Spec(4, 4, 3, (Step("attention", 0, 0, 4), Step("linear", 1, 0, 0, "halves", True)), "flat", 1)
    one, two = RandomNetwork(spec, seed=3), RandomNetwork(spec, seed=3)
    assert all(torch.equal(t, two.state_dict()[name]) for name, t in one.state_dict().items())
    assert eval(repr(spec)) == spec
    assert "v2 = linear(v1, v0, 0, halves, shared)" in str(spec)


def test_generalised_operations_keep_symmetries_and_no_other_laws():
    x, y = torch.randn(2, 3, 4, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    with generalised():
        sums, moved = (x.sum(1), (x @ y.t())), (x[:, order].sum(1), x[:, order] @ y[:, order].t())
        by_rows, by_columns = x.sum(0).sum(), x.sum(1).sum()
        shifted, plain = (x + 1).softmax(1), x.softmax(1)
        left, right = x + y, y + x
    assert all(torch.allclose(a, b) for a, b in zip(sums, moved, strict=True))
    for a, b in ((by_rows, by_columns), (shifted, plain), (left, right)):
        assert not torch.allclose(a, b)


def test_all_orders_of_a_tensor_are_counted():
    tensor = torch.arange(12.0).reshape(4, 3)
    for groups, still in product((1, 2), (set(), {0}, {1})):
        orders = Orders((4, 3), groups, still)
        stack = orders.of(tensor)
        assert len(stack.flatten(1).unique(dim=0)) == len(stack) == orders.count
        assert torch.equal(stack[0], tensor)


def test_brute_force_sees_what_algebra_would_hide():
    """The bias of a key shifts all scores of a softmax alike: only generalised operations show that it moves."""
    spec = Spec(2, 2, 1, (Step("statistics", 0, 0, 4),), "mean")
    model = RandomNetwork(spec)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    orders = {name: Orders(tuple(tensor.shape)) for name, tensor in state.items()}
    assert count_renumberings(model, model.example(1), state, orders) == 2
