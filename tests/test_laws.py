"""The laws that every alignment method keeps on every kind of network, and the mutants that each law must catch.

A law is a function that raises AssertionError where it is broken. It is given what it judges (a method, a transport, a
way to align, a way to store), so that a deliberately wrong one, a mutant, can be put in its place.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from weldnet.alignment import (
    METHODS,
    Alignment,
    AlignmentMethod,
    Gamf,
    OptimalTransport,
    Problem,
    WeightMatching,
    make_method,
    transport,
)
from weldnet.assignment import Permutation, Plan, entropic_plan
from weldnet.errors import AlignmentError, WidthError
from weldnet.structure import Structure, capture, renumber

State = Mapping[str, Tensor]
Couplings = Mapping[str, Permutation]


# -- networks --------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, w: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, w, 3, padding=1, bias=False), nn.BatchNorm2d(w)
        self.one, self.norm1 = nn.Conv2d(w, w + 2, 3, padding=1), nn.BatchNorm2d(w + 2)
        self.two, self.norm2 = nn.Conv2d(w + 2, w, 3, padding=1), nn.BatchNorm2d(w)
        self.head = nn.Linear(w * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.norm(self.stem(x)))
        x = nn.functional.relu(x + self.norm2(self.two(nn.functional.relu(self.norm1(self.one(x))))))
        return self.head(nn.functional.max_pool2d(x, 3).flatten(1))


class Split(nn.Module):
    def __init__(self, w: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, w), nn.Linear(6, w + 1)
        self.mix, self.gate, self.head = nn.Linear(2 * w + 1, 2 * w), nn.Linear(w, w), nn.Linear(w, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(torch.cat([nn.functional.relu(self.left(x)), torch.tanh(self.right(x))], dim=1))
        value, gate = x.chunk(2, dim=1)
        return self.head(nn.functional.relu(self.gate(value)) * torch.sigmoid(gate))


class Tied(nn.Module):
    """One matrix in and out, and one block under two names."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Linear(7, w, bias=False), nn.Linear(w, 2 * w), nn.Linear(2 * w, w)
        self.again = self.up

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(nn.functional.gelu(self.up(x)))
        x = x + self.down(torch.tanh(self.again(x)))
        return nn.functional.linear(x, self.embed.weight.T)


class Recurrent(nn.Module):
    """A layer from a space to itself."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.read, self.keep, self.head = nn.Linear(4, w), nn.Linear(w, w), nn.Linear(w, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.read(x[:, 0]))
        for step in range(1, x.shape[1]):
            h = torch.tanh(self.read(x[:, step]) + self.keep(h))
        return self.head(h)


class Attention(nn.Module):
    def __init__(self, w: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(5, w), nn.LayerNorm(w)
        self.attention = nn.MultiheadAttention(w, 2, batch_first=True)
        self.norm2, self.up, self.down = nn.LayerNorm(w), nn.Linear(w, 10), nn.Linear(10, w)
        self.head = nn.Linear(w, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        seen = self.norm(x)
        x = x + self.attention(seen, seen, seen, need_weights=False)[0]
        return self.head((x + self.down(nn.functional.gelu(self.up(self.norm2(x))))).mean(1))


def mlp(w: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, w), nn.ReLU(), nn.Linear(w, w + 3), nn.Tanh(), nn.Linear(w + 3, 4))


def grouped(w: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 2 * w, 3, padding=1), nn.GroupNorm(w // 2, 2 * w), nn.ReLU(),
        nn.Conv2d(2 * w, 3 * w, 3, padding=1, groups=w // 2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3 * w, 5),
    )  # fmt: skip


def deep(w: int) -> nn.Module:
    """Groups of a convolution, normalised groups inside them, channels inside those."""
    return nn.Sequential(
        nn.Conv2d(3, 4 * w, 3, padding=1), nn.GroupNorm(2 * w, 4 * w), nn.ReLU(),
        nn.Conv2d(4 * w, 2 * w, 3, padding=1, groups=w), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * w, 5),
    )  # fmt: skip


class Normalised(nn.Module):
    """A residual stream in normalised groups, with a convolution from the stream to itself."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, w, 3, padding=1), nn.GroupNorm(w // 3, w)
        self.turn, self.norm1 = nn.Conv2d(w, w, 3, padding=1), nn.GroupNorm(w // 3, w)
        self.head = nn.Linear(w, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.norm(self.stem(x)))
        x = nn.functional.relu(x + self.norm1(self.turn(x)))
        return self.head(x.mean((2, 3)))


def depthwise(w: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, w, 1), nn.ReLU(), nn.Conv2d(w, w, 3, padding=1, groups=w), nn.BatchNorm2d(w), nn.ReLU(),
        nn.Conv2d(w, 2 * w, 1), nn.ReLU(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(8 * w, 5),
    )  # fmt: skip


@dataclass(frozen=True)
class Network:
    """An architecture of a width, and what it takes."""

    name: str
    build: Callable[[int], nn.Module]
    width: int
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return self.name

    def model(self, seed: int) -> nn.Module:
        """Return a network of its own random initialisation, in float64, with normalisation as after some training."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.build(self.width).double().eval()
            for parameter in model.parameters():  # so that float64 is really needed
                nn.init.normal_(noise := torch.empty_like(parameter))
                parameter.data.add_(noise, alpha=1e-3)
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
                    nn.init.normal_(module.weight, 1.0, 0.2)
                    nn.init.normal_(module.bias, 0.0, 0.2)
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.normal_(module.running_mean, 0.0, 0.3)
                    nn.init.uniform_(module.running_var, 0.5, 2.0)
                if isinstance(module, nn.MultiheadAttention):
                    nn.init.normal_(module.in_proj_bias, 0.0, 0.1)
                    nn.init.normal_(module.out_proj.bias, 0.0, 0.1)
        return model

    def state(self, seed: int) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.model(seed).state_dict().items()}

    @property
    def inputs(self) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        return torch.randn(*self.shape, generator=generator, dtype=torch.float64)

    @property
    def structure(self) -> Structure:
        return _structure(self)

    @property
    def unlabelled(self) -> Tensor:
        """Inputs without labels, for methods that look at activations; others than those that outputs are judged on."""
        generator = torch.Generator().manual_seed(11)
        return torch.randn(32, *self.shape[1:], generator=generator, dtype=torch.float64)

    def loaded(self, state: State) -> nn.Module:
        model = self.model(0)
        model.load_state_dict(dict(state))
        return model

    def problem(self, states: Mapping[str, State]) -> Problem:
        """Give a method all that it may ask for: states, their modules, and unlabelled inputs."""
        modules = {name: self.loaded(state) for name, state in states.items()}
        return Problem(self.structure, states, networks=modules, data=self.unlabelled)

    def outputs(self, state: State) -> Tensor:
        model = self.loaded(state)
        with torch.no_grad():
            return model(self.inputs)


@cache
def _structure(network: Network) -> Structure:
    return capture(network.model(0), network.inputs)


NETWORKS = [
    Network("mlp", mlp, 9, (8, 6)),
    Network("residual", Residual, 6, (4, 3, 6, 6)),
    Network("grouped", grouped, 6, (4, 3, 6, 6)),
    Network("split", Split, 6, (8, 6)),
    Network("depthwise", depthwise, 6, (4, 3, 6, 6)),
    Network("tied", Tied, 8, (8, 7)),
    Network("recurrent", Recurrent, 9, (4, 3, 4)),
    Network("attention", Attention, 8, (4, 3, 5)),
    Network("deep", deep, 4, (4, 3, 6, 6)),
    Network("normalised", Normalised, 12, (4, 3, 6, 6)),
]
MLP = NETWORKS[0]
GROUPED = NETWORKS[2]
ATTENTION, DEEP = NETWORKS[7:9]


def random_couplings(structure: Structure, seed: int) -> dict[str, Permutation]:
    """Draw a renumbering of all spaces; blocks move as wholes, and their units inside them."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Permutation] = {}
    for space in structure.spaces:
        if space.parent is None:
            found[space.name] = Permutation(torch.randperm(space.size, generator=generator))
        else:
            parts = [
                a * space.block + torch.randperm(space.block, generator=generator) for a in found[space.parent].source
            ]
            found[space.name] = Permutation(torch.cat(parts))
    return found


def renumbered(network: Network, state: State, seed: int) -> dict[str, Tensor]:
    return renumber(
        state, network.structure, {s: p.source for s, p in random_couplings(network.structure, seed).items()}
    )


def fused(network: Network, states: Mapping[str, State], alignment: Alignment) -> dict[str, Tensor]:
    moved = [transport(state, network.structure, alignment[name]) for name, state in states.items()]
    return {
        name: torch.stack([m[name] for m in moved]).mean(0) if first.is_floating_point() else first
        for name, first in moved[0].items()
    }


def three(network: Network) -> dict[str, dict[str, Tensor]]:
    """Return independently initialised networks."""
    return {name: network.state(seed) for seed, name in enumerate("abc")}


@cache
def aligned(method: AlignmentMethod, network: Network) -> Alignment:
    return method(network.problem(three(network)))


def fused_outputs(method: AlignmentMethod, network: Network, states: Mapping[str, State]) -> Tensor:
    alignment = method(network.problem(states))
    return network.outputs(fused(network, states, alignment))


def difference(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


# -- laws ------------------------------------------------------------------------------------------

Transport = Callable[[State, Structure, Couplings], Mapping[str, Tensor]]
Align = Callable[[Structure, Mapping[str, State], AlignmentMethod], Alignment]


def law_soundness(carry: Transport, network: Network) -> None:
    """A renumbered network computes the same function, from other weights."""
    state = network.state(1)
    for seed in range(3):
        moved = carry(state, network.structure, random_couplings(network.structure, seed))
        assert any(not torch.equal(moved[name], state[name]) for name in state), "nothing was renumbered"
        assert difference(network.outputs(moved), network.outputs(state)) <= 1e-9, "the function changed"


def law_there_and_back(carry: Transport, network: Network) -> None:
    """Carrying there and back leaves every tensor bit for bit as it was."""
    state, there = network.state(1), random_couplings(network.structure, 5)
    moved = carry(state, network.structure, there)
    back = carry(moved, network.structure, {space: p.inverse() for space, p in there.items()})
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), f"{name} did not come back"


def law_transport_blocks(carry: Transport, network: Network) -> None:
    """Couplings that break blocks apart are refused."""
    nested = next(s for s in network.structure.spaces if s.parent is not None)
    couplings = {nested.name: Permutation(torch.arange(nested.size).roll(1))}
    try:
        carry(network.state(1), network.structure, couplings)
    except AlignmentError as error:
        message = str(error)
    else:
        raise AssertionError("a coupling that breaks blocks apart was carried out")
    assert nested.name in message, f"the space is not named in: {message}"


def law_recovery(method: AlignmentMethod, network: Network) -> None:
    """A planted permutation is undone, bit for bit."""
    original = network.state(1)
    for seed in range(2):
        states = {"a": original, "b": renumbered(network, original, seed)}
        alignment = method(network.problem(states))
        back = transport(states["b"], network.structure, alignment["b"])
        for name, tensor in original.items():
            assert torch.equal(back[name], tensor), f"{name} was not recovered"


def law_self(method: AlignmentMethod, network: Network) -> None:
    """Copies of one network stay as they are, and so does their average."""
    state = network.state(1)
    states = dict.fromkeys("abc", state)
    alignment = method(network.problem(states))
    for name in states:
        for space, coupling in alignment[name].items():
            assert coupling == Permutation.identity(len(coupling)), f"{space} moved in {name}"
    for name, tensor in fused(network, states, alignment).items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-14, atol=1e-14)


def law_marginals(method: AlignmentMethod, network: Network) -> None:
    """Every network has a coupling of every space, with the marginals that it declares.

    Permutations keep blocks together, and the network's function if it has no other couplings. Plans share out all of
    every unit, and no less than nothing.
    """
    states, alignment = three(network), aligned(method, network)
    assert list(alignment.couplings) == list(states), f"the networks are {list(alignment.couplings)}"
    for name, state in states.items():
        couplings = alignment[name]
        assert set(couplings) == {s.name for s in network.structure.spaces}, f"{name} lacks a space"
        for space in network.structure.spaces:
            coupling = couplings[space.name]
            if isinstance(coupling, Plan):
                check_plan(coupling, space.name)
                continue
            source = coupling.source
            assert sorted(source.tolist()) == list(range(space.size)), f"{space.name} is no permutation"
            if space.parent is not None:
                blocks = source.reshape(-1, space.block) // space.block
                together = blocks == couplings[space.parent].source[:, None]
                assert bool(together.all()), f"{space.name} breaks up the blocks of {space.parent}"
        if alignment.soft[name]:
            continue
        moved = renumber(state, network.structure, {s: p.source for s, p in couplings.items()})
        assert difference(network.outputs(moved), network.outputs(state)) <= 1e-9, f"the function of {name} changed"


def check_plan(plan: Plan, space: str) -> None:
    for axis, declared in ((1, plan.rows), (0, plan.columns)):
        off = float((plan.values.sum(axis) - declared).abs().max())
        assert off <= 1e-6, f"a marginal of {space} is off by {off:.1e}"
    assert float(plan.values.min()) >= 0, f"{space} gets less than nothing"


def law_anchor(method: AlignmentMethod, network: Network) -> None:
    """The universe is in the order of the first network."""
    for space, coupling in aligned(method, network)["a"].items():
        assert coupling == Permutation.identity(len(coupling)), f"{space} moved in the first network"


def law_settles(method: AlignmentMethod, network: Network) -> None:
    """The search ends where nothing more is to be gained, not in a cycle."""
    assert aligned(method, network).stats["converged"] is True, "the search did not settle"


def law_equivariance(method: AlignmentMethod, network: Network) -> None:
    """Renumbering the inputs first does not change the fused function."""
    states = three(network)
    expected = network.outputs(fused(network, states, aligned(method, network)))
    for moved in ("b", "abc"):
        other = {n: renumbered(network, s, seed=ord(n)) if n in moved else s for n, s in states.items()}
        got = fused_outputs(method, network, other)
        assert difference(got, expected) <= 1e-9, f"renumbering {moved} changed the fused function"


def law_order(method: AlignmentMethod, network: Network) -> None:
    """The order of the networks does not change the fused function."""
    states = three(network)
    expected = network.outputs(fused(network, states, aligned(method, network)))
    for order in ("cba", "bca"):
        got = fused_outputs(method, network, {name: states[name] for name in order})
        assert difference(got, expected) <= 1e-9, f"the order {order} changed the fused function"


def law_purity(method: AlignmentMethod, network: Network) -> None:
    """Inputs stay as they were; the same seed gives the same result, whatever the global generator does."""
    states, before = three(network), three(network)
    problem = network.problem(states)
    assert problem.networks is not None
    with torch.random.fork_rng():
        torch.manual_seed(12345)
        expected = torch.get_rng_state()
        again = method(problem)
        assert torch.equal(torch.get_rng_state(), expected), "the global generator was used"
    for name, state in before.items():
        for tensor, value in state.items():
            assert torch.equal(states[name][tensor], value), f"{tensor} of {name} was changed"
            assert torch.equal(problem.networks[name].state_dict()[tensor], value), f"{tensor} of {name} was trained"
        assert not any(m.training or m._forward_hooks for m in problem.networks[name].modules()), (
            f"{name} was left open"
        )
        assert all(p.requires_grad and p.grad is None for p in problem.networks[name].parameters()), (
            f"{name} has traces"
        )
    assert torch.equal(problem.data, network.unlabelled), "the unlabelled inputs were changed"
    assert again.couplings == aligned(method, network).couplings, "the same seed gave another result"


def law_widths(align: Align, method: AlignmentMethod, network: Network) -> None:
    """Networks of unequal widths are refused, with the name of a space that differs."""
    wider = replace(network, width=2 * network.width)
    try:
        align(network.structure, {"a": network.state(0), "b": wider.state(1)}, method)
    except WidthError as error:
        message = str(error)
    except Exception as error:
        raise AssertionError(f"unequal widths raise {error!r}") from error
    else:
        raise AssertionError("unequal widths went through")
    assert any(repr(space.name) in message for space in network.structure.spaces), f"no space is named in: {message}"
    assert "'b'" in message, f"the network is not named in: {message}"


def law_round_trip(
    save: Callable[[Alignment, Path], None],
    load: Callable[[Path], Alignment],
    method: AlignmentMethod,
    network: Network,
) -> None:
    """Saved, loaded and transported is the same, bit for bit."""
    states = {name: network.state(seed) for seed, name in enumerate(["site 1", "b/c"])}
    alignment = method(network.problem(states))
    with tempfile.TemporaryDirectory() as folder:
        save(alignment, Path(folder) / "alignment.safetensors")
        again = load(Path(folder) / "alignment.safetensors")
    assert list(again.couplings) == list(alignment.couplings), f"the networks are {list(again.couplings)}"
    assert again.couplings == alignment.couplings, "the couplings changed"
    assert again.method == alignment.method, "the method changed"
    assert dict(again.stats) == dict(alignment.stats), "the statistics changed"
    for name, state in states.items():
        expected = transport(state, network.structure, alignment[name])
        for tensor, value in transport(state, network.structure, again[name]).items():
            assert torch.equal(value, expected[tensor]), f"{tensor} of {name} arrives elsewhere"


def direct(structure: Structure, states: Mapping[str, State], method: AlignmentMethod) -> Alignment:
    return method(Problem(structure, states))


# -- every method, every network -------------------------------------------------------------------

#: Optimal transport whose couplings are plans.
SOFT = [
    OptimalTransport(plan="entropic", epsilon=0.05),
    OptimalTransport(marginals="norm"),
]

#: Every registered method with its defaults, variants of GAMF with a short schedule, and soft couplings.
ALL = [
    *(make_method(name) for name in METHODS),
    Gamf(sigma=4.0, gamma=0.5, sweeps=2),
    Gamf(affinity="vector", gamma=0.5, sweeps=2),
    Gamf(activations=0.3, gamma=0.5, sweeps=2),
    OptimalTransport(on="activations", samples=32),
    *SOFT,
]

_MEANS = "brings several units to one"

#: Methods that do not claim a law, and why: a method's name, or the method itself.
EXEMPT: dict[str, dict[str | AlignmentMethod, str]] = {
    "recovery": {"identity": "aligns nothing", **dict.fromkeys(SOFT, _MEANS)},
    "self": dict.fromkeys(SOFT, _MEANS),
    "settles": {"straight_through": "passes over the data so many times, and keeps the best"},
    "equivariance": {m.name: "starts from the order that is given" for m in ALL if not m.equivariant},
    "order": {m.name: "the order decides" for m in ALL if not m.order_invariant},
}


def exempt(law: str, method: AlignmentMethod) -> str:
    """Return why a method does not claim a law; empty if it does."""
    known = EXEMPT.get(law, {})
    return known.get(method.name, "") or known.get(method, "")


def methods(law: str = "") -> list[AlignmentMethod]:
    return [method for method in ALL if not exempt(law, method)]


#: What is asked of every method on every network; the page of results shows it (`studies/laws_table.py`).
TABLE: dict[str, Callable[[AlignmentMethod, Network], None]] = {
    "recovery": law_recovery,
    "self": law_self,
    "marginals": law_marginals,
    "anchor": law_anchor,
    "settles": law_settles,
    "equivariance": law_equivariance,
    "order": law_order,
    "purity": law_purity,
    "widths": partial(law_widths, direct),
    "round trip": partial(law_round_trip, Alignment.save, Alignment.load),
}


every_network = pytest.mark.parametrize("network", NETWORKS, ids=str)


def every_method(of: Sequence[AlignmentMethod]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("method", of, ids=repr)


@every_network
def test_networks_have_freedom_to_judge(network):
    structure = network.structure
    assert structure.free_share == 1.0, str(structure)
    assert not structure.unknown
    assert structure.log10_renumberings > 4


def test_networks_cover_nesting_and_tying():
    assert any(s.parent for s in GROUPED.structure.spaces)
    assert any(s.parent for s in ATTENTION.structure.spaces)
    assert any(s.parent and DEEP.structure.space(s.parent).parent for s in DEEP.structure.spaces)
    assert any(n.structure.aliases for n in NETWORKS)


def test_random_networks_and_renumberings_differ():
    for network in NETWORKS:
        states = three(network)
        assert difference(network.outputs(states["a"]), network.outputs(states["b"])) > 0.1
        moved = renumbered(network, states["a"], seed=0)
        assert any(not torch.equal(moved[name], tensor) for name, tensor in states["a"].items())


@every_network
def test_transport_is_sound(network):
    law_soundness(transport, network)
    law_there_and_back(transport, network)


@pytest.mark.parametrize("network", [n for n in NETWORKS if any(s.parent for s in n.structure.spaces)], ids=str)
def test_transport_keeps_blocks(network):
    law_transport_blocks(transport, network)


@every_network
@pytest.mark.parametrize(("law", "method"), [(law, m) for law in TABLE for m in methods(law)], ids=repr)
def test_methods_keep_the_laws(law, method, network):
    TABLE[law](method, network)


def test_reasons_for_not_claiming_a_law_are_those_of_methods_that_are_there():
    for law, reasons in EXEMPT.items():
        assert law in TABLE
        assert all(any(key in (m.name, m) for m in ALL) for key in reasons), law


# -- mutants ---------------------------------------------------------------------------------------


def changed(alignment: Alignment, change: Callable[[str, str, Permutation], Permutation]) -> Alignment:
    """Return an alignment with every coupling changed, given its network and space."""
    couplings = {n: {s: change(n, s, p) for s, p in spaces.items()} for n, spaces in alignment.couplings.items()}
    return replace(alignment, couplings=couplings)


@dataclass(frozen=True)
class Mutant:
    """A wrong method: what it does, given a problem."""

    what: str
    run: Callable[[Problem], Alignment]
    name = "mutant"
    order_invariant = True
    equivariant = True
    needs_data = False
    any_width = False

    def __repr__(self) -> str:
        return self.what

    def __call__(self, problem: Problem, /) -> Alignment:
        return self.run(problem)


def honest(problem: Problem) -> Alignment:
    return WeightMatching()(problem)


def forgets_what_it_found(problem: Problem) -> Alignment:
    return changed(honest(problem), lambda n, s, p: Permutation.identity(len(p)))


def inverts(problem: Problem) -> Alignment:
    return changed(honest(problem), lambda n, s, p: p.inverse())


def forgets_one_space(problem: Problem) -> Alignment:
    first = problem.structure.spaces[0].name
    return changed(honest(problem), lambda n, s, p: Permutation.identity(len(p)) if s == first else p)


def moves_copies(problem: Problem) -> Alignment:
    return changed(honest(problem), lambda n, s, p: Permutation(p.source.roll(1)) if n == "b" else p)


def breaks_blocks(problem: Problem) -> Alignment:
    nested = {s.name for s in problem.structure.spaces if s.parent is not None}
    return changed(honest(problem), lambda n, s, p: Permutation(p.source.roll(1)) if s in nested and n == "b" else p)


def leaves_a_space_out(problem: Problem) -> Alignment:
    alignment = honest(problem)
    return replace(alignment, couplings={n: dict(list(c.items())[1:]) for n, c in alignment.couplings.items()})


def leaves_a_network_out(problem: Problem) -> Alignment:
    alignment = honest(problem)
    return replace(alignment, couplings=dict(list(alignment.couplings.items())[:-1]))


def takes_another_anchor(problem: Problem) -> Alignment:
    return honest(problem).relative_to(problem.names[1])


def draws_from_the_global_generator(problem: Problem) -> Alignment:
    return WeightMatching()(replace(problem, seed=int(torch.randint(1000, ()))))


def goes_round_in_circles(problem: Problem) -> Alignment:
    return WeightMatching(sweeps=1)(problem)


CALLS = itertools.count()


def remembers_earlier_calls(problem: Problem) -> Alignment:
    shift = next(CALLS) % 7
    return changed(honest(problem), lambda n, s, p: Permutation(p.source.roll(shift)) if n == "c" else p)


def scales_its_inputs(problem: Problem) -> Alignment:
    alignment = honest(problem)
    for tensor in problem.states[problem.names[-1]].values():
        if tensor.is_floating_point():
            tensor.div_(tensor.norm())
    return alignment


def forgets_the_plan_of_a_unit(problem: Problem) -> Alignment:
    """Bring nothing of one unit anywhere, though the marginals say that all of it arrives."""
    alignment = SOFT[0](problem)
    space, plan = next((s, c) for s, c in alignment["b"].items() if isinstance(c, Plan))
    wrong = copy.copy(plan)
    object.__setattr__(wrong, "values", plan.values * (torch.arange(len(plan.values)) > 0)[:, None])
    return replace(alignment, couplings={**alignment.couplings, "b": {**alignment["b"], space: wrong}})


def compares_by_position(problem: Problem) -> Alignment:
    """Couple units softly to those whose numbers are near."""
    alignment = SOFT[0](problem)
    near = {s: (torch.arange(len(c))[:, None] - torch.arange(len(c))).abs().double() for s, c in alignment["b"].items()}
    couplings = {
        name: {s: Plan(entropic_plan(near[s], c.rows, c.columns, 0.1)[0], c.rows, c.columns) if name != "a" else c
               for s, c in spaces.items()}
        for name, spaces in alignment.couplings.items()
    }  # fmt: skip
    return replace(alignment, couplings=couplings)


def rounds_soft_couplings(problem: Problem) -> Alignment:
    """Take the largest entry of each column: two universe units get the same network unit."""

    def rounded(network: str, space: str, p: Permutation) -> Permutation:
        soft = p.matrix() + 0.0
        soft[:, 1] = soft[:, 0]
        return Permutation(soft.argmax(0))

    return changed(honest(problem), rounded)


def trains_its_networks(problem: Problem) -> Alignment:
    assert problem.networks is not None
    for network in problem.networks.values():
        with torch.no_grad():
            next(network.parameters()).mul_(0.9)
    return honest(problem)


def leaves_hooks_behind(problem: Problem) -> Alignment:
    assert problem.networks is not None
    for network in problem.networks.values():
        network.register_forward_hook(lambda module, given, output: None)
    return honest(problem)


def leaves_gradients_behind(problem: Problem) -> Alignment:
    assert problem.networks is not None
    for network in problem.networks.values():
        network(problem.data).sum().backward()
    return honest(problem)


def scales_the_data(problem: Problem) -> Alignment:
    assert isinstance(problem.data, Tensor)
    problem.data.div_(problem.data.norm())
    return honest(problem)


def moves_nothing(state: State, structure: Structure, couplings: Couplings) -> Mapping[str, Tensor]:
    return dict(state)


def forgets_vectors(state: State, structure: Structure, couplings: Couplings) -> Mapping[str, Tensor]:
    return {n: state[n] if state[n].dim() == 1 else t for n, t in transport(state, structure, couplings).items()}


def forgets_inputs_of_layers(state: State, structure: Structure, couplings: Couplings) -> Mapping[str, Tensor]:
    outputs_only = replace(structure, places=tuple(p for p in structure.places if p.axes == (0,)))
    return renumber(state, outputs_only, {s: p.source for s, p in couplings.items()})


def goes_backwards_on_inputs(state: State, structure: Structure, couplings: Couplings) -> Mapping[str, Tensor]:
    outputs = replace(structure, places=tuple(p for p in structure.places if p.axes == (0,)))
    inputs = replace(structure, places=tuple(p for p in structure.places if p.axes != (0,)))
    half = renumber(state, outputs, {s: p.source for s, p in couplings.items()})
    return renumber(half, inputs, {s: p.inverse().source for s, p in couplings.items()})


def loses_precision(state: State, structure: Structure, couplings: Couplings) -> Mapping[str, Tensor]:
    moved = transport(state, structure, couplings)
    return {n: t.float().to(t.dtype) if t.is_floating_point() else t for n, t in moved.items()}


def checks_nothing(state: State, structure: Structure, couplings: Couplings) -> Mapping[str, Tensor]:
    return renumber(state, structure, {s: p.source for s, p in couplings.items()})


def names_no_space(state: State, structure: Structure, couplings: Couplings) -> Mapping[str, Tensor]:
    try:
        return transport(state, structure, couplings)
    except AlignmentError:
        raise AlignmentError("the couplings do not fit") from None


def crops(structure: Structure, states: Mapping[str, State], method: AlignmentMethod) -> Alignment:
    """Cut every tensor to the structure's shape."""
    fitting = {
        name: {n: t[tuple(slice(size) for size in structure.shapes[n])] for n, t in state.items()}
        for name, state in states.items()
    }
    return method(Problem(structure, fitting))


def only_says_that_shapes_differ(
    structure: Structure, states: Mapping[str, State], method: AlignmentMethod
) -> Alignment:
    try:
        return direct(structure, states, method)
    except WidthError:
        raise WidthError("shapes differ") from None


def fails_somewhere_inside(structure: Structure, states: Mapping[str, State], method: AlignmentMethod) -> Alignment:
    raise RuntimeError("The size of tensor a (9) must match the size of tensor b (18) at non-singleton dimension 0")


def load_inverted(path: Path) -> Alignment:
    return changed(Alignment.load(path), lambda n, s, p: p.inverse())


def load_without_stats(path: Path) -> Alignment:
    return replace(Alignment.load(path), stats={})


def load_only_the_last(path: Path) -> Alignment:
    alignment = Alignment.load(path)
    return replace(alignment, couplings=dict(list(alignment.couplings.items())[-1:]))


def save_in_another_order(alignment: Alignment, path: Path) -> None:
    replace(alignment, couplings=dict(reversed(alignment.couplings.items()))).save(path)


#: (law, its arguments with a mutant among them, what the law must say)
CAUGHT: list[tuple[Callable[..., None], tuple[object, ...], str]] = [
    (law_soundness, (moves_nothing, MLP), "nothing was renumbered"),
    (law_soundness, (forgets_vectors, MLP), "the function changed"),
    (law_soundness, (forgets_inputs_of_layers, MLP), "the function changed"),
    (law_soundness, (goes_backwards_on_inputs, MLP), "the function changed"),
    (law_soundness, (loses_precision, MLP), "the function changed"),
    (law_there_and_back, (loses_precision, MLP), "did not come back"),
    (law_transport_blocks, (checks_nothing, GROUPED), "was carried out"),
    (law_transport_blocks, (names_no_space, GROUPED), "is not named"),
    (law_recovery, (Mutant("forgets what it found", forgets_what_it_found), MLP), "was not recovered"),
    (law_recovery, (Mutant("inverts", inverts), MLP), "was not recovered"),
    (law_recovery, (Mutant("forgets one space", forgets_one_space), MLP), "was not recovered"),
    (law_self, (Mutant("moves copies", moves_copies), MLP), "moved in b"),
    (law_marginals, (Mutant("breaks blocks", breaks_blocks), GROUPED), "breaks up the blocks"),
    (law_marginals, (Mutant("leaves a space out", leaves_a_space_out), MLP), "lacks a space"),
    (law_marginals, (Mutant("leaves a network out", leaves_a_network_out), MLP), "the networks are"),
    (law_marginals, (Mutant("forgets a unit", forgets_the_plan_of_a_unit), MLP), "a marginal of"),
    (law_anchor, (Mutant("takes another anchor", takes_another_anchor), MLP), "moved in the first network"),
    (law_settles, (Mutant("goes round in circles", goes_round_in_circles), MLP), "did not settle"),
    (law_equivariance, (Mutant("starts from the identity", honest), MLP), "changed the fused function"),
    (law_equivariance, (Mutant("forgets what it found", forgets_what_it_found), MLP), "changed the fused function"),
    (law_equivariance, (Mutant("compares by position", compares_by_position), MLP), "changed the fused function"),
    (law_order, (Mutant("goes by position", honest), MLP), "changed the fused function"),
    (law_purity, (Mutant("draws globally", draws_from_the_global_generator), MLP), "global generator"),
    (law_purity, (Mutant("remembers earlier calls", remembers_earlier_calls), MLP), "another result"),
    (law_purity, (Mutant("scales its inputs", scales_its_inputs), MLP), "was changed"),
    (law_purity, (Mutant("trains its networks", trains_its_networks), MLP), "was trained"),
    (law_purity, (Mutant("leaves hooks behind", leaves_hooks_behind), MLP), "was left open"),
    (law_purity, (Mutant("leaves gradients behind", leaves_gradients_behind), MLP), "has traces"),
    (law_purity, (Mutant("scales the data", scales_the_data), MLP), "unlabelled inputs were changed"),
    (law_widths, (crops, WeightMatching(), MLP), "went through"),
    (law_widths, (only_says_that_shapes_differ, WeightMatching(), MLP), "no space is named"),
    (law_widths, (fails_somewhere_inside, WeightMatching(), MLP), "unequal widths raise"),
    (law_round_trip, (Alignment.save, load_inverted, WeightMatching(), MLP), "the couplings changed"),
    (law_round_trip, (Alignment.save, load_without_stats, WeightMatching(), MLP), "the statistics changed"),
    (law_round_trip, (Alignment.save, load_only_the_last, WeightMatching(), MLP), "the networks are"),
    (law_round_trip, (save_in_another_order, Alignment.load, WeightMatching(), MLP), "the networks are"),
]


@pytest.mark.parametrize(
    ("law", "arguments", "says"),
    CAUGHT,
    ids=[
        f"{law.__name__}-{getattr(args[0], '__name__', repr(args[0]))}-{i}" for i, (law, args, _) in enumerate(CAUGHT)
    ],
)
def test_mutants_are_caught(law, arguments, says):
    with pytest.raises(AssertionError, match=says):
        law(*arguments)


def test_every_law_catches_a_mutant():
    laws = {name for name in globals() if name.startswith("law_")}
    assert laws == {law.__name__ for law, _, _ in CAUGHT}


def test_what_the_mutants_are_made_of_is_not_caught():
    """The mutants fail for what they do wrong, not for the honest method around it."""
    law_recovery(Mutant("honest", honest), MLP)
    law_self(Mutant("honest", honest), MLP)
    law_marginals(Mutant("honest", honest), GROUPED)
    law_anchor(Mutant("honest", honest), MLP)
    law_purity(Mutant("honest", honest), MLP)


def test_rounding_soft_couplings_is_impossible():
    with pytest.raises(AlignmentError, match="permutation"):
        aligned(Mutant("rounds soft couplings", rounds_soft_couplings), MLP)
