"""Repairs: laws that hold for every one, and each against a direct computation."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from networks import NETWORKS, Net, enliven
from weldnet import models
from weldnet.activations import Observer, carry_channels, find_layers
from weldnet.alignment import Alignment, align, transport
from weldnet.assignment import Coupling, Permutation, Plan
from weldnet.errors import DataError, UsageError
from weldnet.fusion import (
    REPAIRS,
    Auto,
    Averaged,
    BatchNormReset,
    Calibrate,
    Chain,
    NoRepair,
    Refit,
    Repair,
    Repaired,
    Rescale,
    Synthetic,
    WeightNorms,
    average,
    fuse,
    make_repair,
)
from weldnet.fusion import _auto as auto_module
from weldnet.fusion._affine import read_matrix, read_rows, write_matrix
from weldnet.fusion._batch_norm import has_statistics
from weldnet.fusion._bench import Bench
from weldnet.fusion._guard import Guard
from weldnet.fusion._inversion import invert
from weldnet.fusion._least_squares import Ridge
from weldnet.fusion._synthetic import make_inputs
from weldnet.structure import capture, random_renumbering

BUILT: dict[str, tuple[dict[str, object], tuple[int, ...]]] = {
    "mlp": ({"sizes": (20, 12, 9, 5)}, (48, 20)),
    "simple_cnn": ({"width": 0.25, "image_size": 8}, (24, 1, 8, 8)),
    "vgg11": ({"width": 1 / 16, "bias": False}, (24, 3, 32, 32)),
    "resnet20": ({"width": 0.25}, (24, 3, 16, 16)),
}
WIRED = ["residual", "concatenation", "depthwise", "grouped", "two_names", "tied_transposed", "encoder_layer"]
NAMES = [*BUILT, *WIRED]
ALL: list[Repair] = [
    NoRepair(),
    WeightNorms(),
    Synthetic(count=16, steps=3),
    BatchNormReset(),
    Rescale(),
    Rescale(shift=True),
    Refit(),
    Refit(ridge=0.5, rounds=1),
    Calibrate(),
    Auto(),
]
CALLS = itertools.count()


def exempt(law: str, repair: Repair) -> str:
    """Return why a repair does not claim a law; empty if it does."""
    if law == "self" and isinstance(repair, BatchNormReset):
        return "the inputs' own statistics replace those of training"
    return ""


def many(example: object, count: int = 16) -> Tensor:
    """More inputs like the example."""
    assert isinstance(example, Tensor)
    generator = torch.Generator().manual_seed(5)
    if not example.is_floating_point():
        return torch.randint(0, int(example.max()) + 1, (count, *example.shape[1:]), generator=generator)
    return torch.randn(count, *example.shape[1:], dtype=example.dtype, generator=generator)


@cache
def network(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    if name not in BUILT:
        return NETWORKS[name].model(seed), many(NETWORKS[name].example())
    options, shape = BUILT[name]
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return enliven(models.build(name, **options), x, seed), x


def averaged(parents: Sequence[nn.Module], x: Tensor, shares: Sequence[float] | None = None, **changes) -> Averaged:
    """Align and average, as fuse() does."""
    names = [f"net{i}" for i in range(len(parents))]
    modules = dict(zip(names, parents, strict=True))
    shares = shares or [1 / len(parents)] * len(parents)
    structure = capture(parents[0], x[:2])
    alignment = align(modules, structure, method=changes.pop("method", "weight_matching"))
    states = [transport(m.state_dict(), structure, alignment[n]) for n, m in modules.items()]
    model = copy.deepcopy(parents[0])
    model.load_state_dict(average(states, shares))
    return Averaged(
        model, modules, dict(zip(names, shares, strict=True)), structure, alignment, example_input=x[:2], **changes
    )


def renumbered(model: nn.Module, x: Tensor, seed: int) -> tuple[nn.Module, dict[str, Coupling]]:
    """A network with its units renumbered, and the couplings that undo it."""
    structure = capture(model, x[:2])
    sources = random_renumbering(structure, torch.Generator().manual_seed(seed))
    twin = copy.deepcopy(model)
    twin.load_state_dict(transport(model.state_dict(), structure, {s: Permutation(p) for s, p in sources.items()}))
    return twin, {s: Permutation(p.argsort()) for s, p in sources.items()}


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def networks_for(repair: Repair) -> list[str]:
    """Return the networks that a repair takes: some have nothing that it could mend, and are refused."""
    if isinstance(repair, BatchNormReset):
        return [name for name in NAMES if has_statistics(network(name)[0])]
    if isinstance(repair, Calibrate):  # no layer of its own gives the answer
        return [name for name in NAMES if name != "tied_transposed"]
    return NAMES


# -- laws ------------------------------------------------------------------------------------------


def law_self(repair: Repair, name: str) -> None:
    """Repairing the fusion of a network with itself changes nothing."""
    model, x = network(name)
    twin, there = renumbered(model, x, 3)
    stay = {space: Permutation.identity(len(back)) for space, back in there.items()}
    parents, couplings = {"a": model, "b": twin, "c": model}, Alignment({"a": stay, "b": there, "c": stay})
    structure = capture(model, x[:2])
    whole = Averaged(model, parents, {"a": 0.2, "b": 0.3, "c": 0.5}, structure, couplings, example_input=x[:2])
    off = (outputs(repair(whole, x).model, x) - outputs(model, x)).abs()
    assert float((off - 1e-8 * outputs(model, x).abs()).max()) <= 1e-8, "the function changed"


def law_purity(repair: Repair, name: str) -> None:
    """Inputs stay as they were; the same seed gives the same, bit for bit, whatever the global generator does."""
    (a, x), (b, _) = network(name), network(name, 1)
    whole = averaged([a, b], x, [0.3, 0.7])
    before = [copy.deepcopy(m.state_dict()) for m in (a, b, whole.model)]
    given, state = x.clone(), torch.random.get_rng_state()
    one = repair(whole, x)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"
    with torch.random.fork_rng():
        torch.manual_seed(12345)
        two = repair(whole, x)
    for module, old in zip((a, b, whole.model), before, strict=True):
        assert all(torch.equal(t, old[k]) for k, t in module.state_dict().items()), "an input was changed"
        assert not any(m._forward_hooks for m in module.modules()), "a hook was left behind"
    assert torch.equal(x, given), "the unlabelled inputs were changed"
    for key, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, two.model.state_dict()[key]), f"{key}: the same seed gave another result"
        assert not tensor.is_floating_point() or bool(tensor.isfinite().all()), f"{key} is not finite"
    assert one.summary == two.summary, "the same seed gave another summary"


#: What is asked of every repair on every network; the page of results shows it (`studies/laws_table.py`).
TABLE: dict[str, Callable[[Repair, str], None]] = {"self": law_self, "purity": law_purity}


@pytest.mark.parametrize(
    ("law", "repair", "name"),
    [(law, r, name) for law in TABLE for r in ALL if not exempt(law, r) for name in networks_for(r)],
    ids=repr,
)
def test_repairs_keep_the_laws(law, repair, name):
    TABLE[law](repair, name)


@dataclass(frozen=True)
class Mutant:
    """A wrong repair: what it does to the copy that an honest one gives."""

    run: Callable[[Averaged, Tensor, nn.Module], None]

    def __call__(self, averaged: Averaged, data: Tensor, /) -> Repaired:
        repaired = Rescale()(averaged, data)
        with torch.no_grad():
            self.run(averaged, data, repaired.model)
        return repaired


def weight_of(model: nn.Module) -> Tensor:
    return next(iter(model.parameters())).data


@pytest.mark.parametrize(
    ("law", "wrong", "says"),
    [
        (law_self, lambda whole, x, model: weight_of(model).mul_(1.01), "the function changed"),
        (law_purity, lambda whole, x, model: weight_of(whole.parents["net0"]).mul_(1.01), "an input was changed"),
        (law_purity, lambda whole, x, model: weight_of(whole.model).mul_(1.01), "an input was changed"),
        (law_purity, lambda whole, x, model: x.mul_(1.01), "the unlabelled inputs were changed"),
        (law_purity, lambda whole, x, model: torch.rand(1), "the global generator was used"),
        (law_purity, lambda whole, x, model: weight_of(model).add_(next(CALLS)), "the same seed gave another result"),
        (law_purity, lambda whole, x, model: weight_of(model).mul_(torch.inf), "is not finite"),
        (
            law_purity,
            lambda whole, x, model: whole.parents["net1"].register_forward_hook(lambda module, given, out: None),
            "a hook was left behind",
        ),
    ],
)
def test_wrong_repairs_are_caught(law, wrong, says):
    network.cache_clear()
    try:
        law(Mutant(lambda *given: None), "mlp")
        with pytest.raises(AssertionError, match=says):
            law(Mutant(wrong), "mlp")
    finally:
        network.cache_clear()


@pytest.mark.parametrize("repair", [Rescale(), Rescale(shift=True), Refit()], ids=repr)
@pytest.mark.parametrize("name", ["mlp", "simple_cnn", "resnet20", "grouped"])
def test_batches_of_any_size_give_the_same(name, repair):
    (a, x), (b, _) = network(name), network(name, 1)
    whole = averaged([a, b], x)
    at_once = outputs(repair(whole, x).model, x)
    streamed = outputs(repair(whole, list(x.split(5))).model, x)
    torch.testing.assert_close(streamed, at_once, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", [*BUILT, *WIRED])
def test_auto_is_never_farther_from_the_ensemble_on_what_it_held_back(name):
    (a, x), (b, _) = network(name), network(name, 1)
    whole = averaged([a, b], x)
    repaired = Auto()(whole, x)
    held = x[3::4]
    guard = Guard(whole, [held])
    assert guard.distance(repaired.model) <= guard.distance(whole.model)
    assert repaired.numbers["held_back"] == len(held)
    assert {"none", "data", "refit"} <= set(repaired.numbers["distances"])


# -- auto ------------------------------------------------------------------------------------------


class Spoil:
    """A repair that wrecks the network."""

    def __init__(self, samples: int = 0) -> None:
        self.samples = samples

    def __call__(self, averaged: Averaged, data: object) -> Repaired:
        model = copy.deepcopy(averaged.model)
        for parameter in model.parameters():
            parameter.data.mul_(-3)
        return Repaired(model, "spoiled")


def test_auto_keeps_the_average_where_every_repair_is_worse(monkeypatch):
    (a, x), (b, _) = network("mlp"), network("mlp", 1)
    whole = averaged([a, b], x)
    monkeypatch.setattr(auto_module, "Refit", Spoil)
    monkeypatch.setattr(auto_module, "Rescale", Spoil)
    repaired = Auto()(whole, x)
    assert repaired.model is whole.model
    assert "none, nothing came nearer" in repaired.summary
    assert repaired.numbers["chosen"] == "none"


def test_auto_says_what_was_tried_and_why_it_won():
    (a, x), (b, _) = network("mlp"), network("mlp", 1)
    repaired = Auto()(averaged([a, b], x), x)
    distances = repaired.numbers["distances"]
    assert repaired.numbers["chosen"] == min(distances, key=distances.get)
    assert "divergence from the parents' ensemble on 12 held-back inputs: none " in repaired.summary


def test_auto_with_too_little_data_says_so():
    (a, x), (b, _) = network("mlp"), network("mlp", 1)
    assert "3 unlabelled inputs are too few" in Auto()(averaged([a, b], x), x[:3]).summary
    (a, x), (b, _) = network("resnet20"), network("resnet20", 1)
    assert "re-estimated on 3 unlabelled inputs, too few to hold any back" in Auto()(averaged([a, b], x), x[:3]).summary


def test_the_distance_is_the_divergence_from_the_mean_probabilities():
    (a, x), (b, _) = network("mlp"), network("mlp", 1)
    whole = averaged([a, b], x, [0.25, 0.75])
    guard = Guard(whole, list(x.split(7)))
    p = 0.25 * outputs(a, x).softmax(1) + 0.75 * outputs(b, x).softmax(1)
    wanted = functional.kl_div(outputs(whole.model, x).log_softmax(1), p, reduction="batchmean")
    assert guard.distance(whole.model) == pytest.approx(float(wanted))
    assert Guard(averaged([a, a], x), [x]).distance(a) == pytest.approx(0, abs=1e-12)


def test_other_outputs_are_compared_by_squares():
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1)).double() for _ in range(2))
    x = torch.randn(32, 4, dtype=torch.float64)
    whole = averaged([a, b], x)
    mean = (outputs(a, x) + outputs(b, x)) / 2
    wanted = (outputs(whole.model, x) - mean).square().sum() / mean.square().sum()
    assert Guard(whole, [x]).distance(whole.model) == pytest.approx(float(wanted))
    assert "squared distance" in Auto()(whole, x).summary


# -- rescale ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("name", ["mlp", "simple_cnn", "vgg11", "grouped"])
def test_deviations_are_the_parents_mean(name, shift):
    """Measured afterwards by other means, at every layer, after all earlier ones were rescaled."""
    (a, x), (b, _) = network(name), network(name, 1)
    whole = averaged([a, b], x, [0.3, 0.7])
    model = Rescale(shift=shift)(whole, list(x.split(7))).model
    structures = dict.fromkeys(("fused", *whole.parents), whole.structure)
    seen = next(Observer({"fused": model, **whole.parents}, structures).batches([x], samples=len(x), batch_size=len(x)))
    layers = [layer for layer in find_layers(model, whole.structure) if layer.kind == "affine"]
    assert layers
    for layer in layers:
        rows = {
            n: carry_channels(seen[n][layer.name], layer.places, whole.structure, whole.alignment[n])
            for n in whole.parents
        }
        wanted = 0.3 * rows["net0"].std(0, correction=0) + 0.7 * rows["net1"].std(0, correction=0)
        found = seen["fused"][layer.name]
        alive = found.std(0) > 1e-9
        torch.testing.assert_close(found.std(0, correction=0)[alive], wanted[alive], rtol=1e-6, atol=1e-9)
        if shift and layer.bias is not None:
            torch.testing.assert_close(found.mean(0), 0.3 * rows["net0"].mean(0) + 0.7 * rows["net1"].mean(0))


def test_a_norm_gets_the_parents_means_and_deviations():
    (a, x), (b, _) = network("resnet20"), network("resnet20", 1)
    whole = averaged([a, b], x)
    model = Rescale()(whole, x).model
    structures = dict.fromkeys(("fused", *whole.parents), whole.structure)
    seen = next(Observer({"fused": model, **whole.parents}, structures).batches(x, samples=24))
    norms = [layer for layer in find_layers(model, whole.structure) if layer.kind == "norm"]
    for layer in norms:
        rows = [
            carry_channels(seen[n][layer.name], layer.places, whole.structure, whole.alignment[n])
            for n in whole.parents
        ]
        found = seen["fused"][layer.name]
        torch.testing.assert_close(found.mean(0), sum(r.mean(0) for r in rows) / 2, rtol=1e-6, atol=1e-6)
        deviation = sum(r.std(0) for r in rows) / 2
        torch.testing.assert_close(found.std(0), deviation, rtol=1e-4, atol=1e-4)


# -- refit -----------------------------------------------------------------------------------------


def direct(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The stated objective as one call of lstsq on a stacked system."""
    centered = x - x.mean(0)
    pull = (ridge * centered.square().sum(0).mean()).sqrt()
    ones = torch.ones(len(x), 1).to(x)
    top = torch.cat([x, ones], 1)
    below = torch.cat([pull * torch.eye(x.shape[1]).to(x), torch.zeros(x.shape[1], 1).to(x)], 1)
    right = torch.cat([target, pull * weight.T])
    solved = torch.linalg.lstsq(torch.cat([top, below]), right).solution
    return solved[:-1].T, solved[-1]


@pytest.mark.parametrize("ridge", [1e-6, 0.1, 3.0])
def test_refit_minimises_what_it_states(ridge):
    torch.manual_seed(1)
    a, b = (nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double() for _ in range(2))
    x = torch.randn(40, 4, dtype=torch.float64) + 1
    whole = averaged([a, b], x, [0.25, 0.75])
    refitted = Refit(ridge=ridge)(whole, x).model
    layer = find_layers(a, whole.structure)[0]
    hidden = {
        n: carry_channels(m[0](x).detach(), layer.places, whole.structure, whole.alignment[n])
        for n, m in whole.parents.items()
    }
    target = 0.25 * hidden["net0"] + 0.75 * hidden["net1"]
    weight, bias = direct(x, whole.model[0].weight.data, whole.model[0].bias.data, target, ridge)
    torch.testing.assert_close(refitted[0].weight.data, weight)
    torch.testing.assert_close(refitted[0].bias.data, bias)
    given = torch.tanh(x @ weight.T + bias)
    logits = 0.25 * outputs(a, x) + 0.75 * outputs(b, x)
    weight, bias = direct(given, whole.model[2].weight.data, whole.model[2].bias.data, logits, ridge)
    torch.testing.assert_close(refitted[2].weight.data, weight)
    torch.testing.assert_close(refitted[2].bias.data, bias)


@pytest.mark.parametrize("name", ["smooth", "convolutions", "normed"])
def test_equal_parents_are_reproduced_from_wrong_weights(name):
    """With next to no ridge the answer is in reach, and found, whatever the average was."""
    torch.manual_seed(2)
    build: dict[str, Callable[[], nn.Module]] = {
        "smooth": lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.Sigmoid(), nn.Linear(4, 3)),
        "convolutions": lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="reflect"), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2),
            nn.Tanh(), nn.ConvTranspose2d(4, 2, 3, stride=2, output_padding=1),
        ),
        "normed": lambda: nn.Sequential(
            nn.Conv1d(3, 4, 2, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4),
        ),
    }  # fmt: skip
    shapes = {"smooth": (60, 5), "convolutions": (40, 3, 6, 6), "normed": (50, 3, 9)}
    x = torch.randn(shapes[name], dtype=torch.float64)
    parent = enliven(build[name](), x, 0).eval()
    wrong = copy.deepcopy(parent)
    for parameter in wrong.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    structure = capture(parent, x[:2])
    whole = Averaged(wrong, {"a": parent, "b": parent}, {"a": 0.5, "b": 0.5}, structure, example_input=x[:2])
    assert not torch.allclose(outputs(wrong, x), outputs(parent, x), atol=0.1)
    found = Refit(ridge=1e-12)(whole, x).model
    torch.testing.assert_close(outputs(found, x), outputs(parent, x), rtol=1e-4, atol=1e-4)


def test_more_rounds_descend_on_the_rectified_loss():
    torch.manual_seed(3)
    a, b = (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double() for _ in range(2))
    x = torch.randn(64, 6, dtype=torch.float64)
    whole = averaged([a, b], x)
    layer = find_layers(a, whole.structure)[0]
    hidden = [
        carry_channels(m[0](x).detach(), layer.places, whole.structure, whole.alignment[n]).relu()
        for n, m in whole.parents.items()
    ]
    h = (hidden[0] + hidden[1]) / 2

    def loss(model: nn.Module) -> float:
        z = model[0](x).detach()
        return float(torch.where(h > 0, z - h, z.relu()).square().sum())

    losses = [loss(whole.model), *(loss(Refit(ridge=1e-6, rounds=r)(whole, x).model) for r in (1, 2, 4, 8))]
    assert all(later < earlier for earlier, later in pairwise(losses))


def test_fewer_rows_than_columns_solve_the_same_problem():
    torch.manual_seed(4)
    x, residual = torch.randn(9, 2, 12, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    for shift in (False, True):
        change, moved = Ridge(x, 0.3, shift=shift).solve(residual)
        doubled = Ridge(x.repeat(3, 1, 1), 0.3, shift=shift).solve(residual.repeat(3, 1))
        torch.testing.assert_close((change, moved), doubled)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(5, 4), (3, 7, 5)),
        (nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (3, 4, 11)),
        (nn.Conv2d(4, 8, (3, 2), padding="same", groups=4), (3, 4, 6, 5)),
        (nn.Conv2d(3, 5, 3, stride=(2, 1), padding=1, padding_mode="circular"), (2, 3, 6, 5)),
        (nn.Conv3d(2, 4, 2, padding=1, padding_mode="replicate"), (2, 2, 3, 4, 3)),
        (nn.Conv2d(6, 6, 3, groups=6), (2, 6, 5, 5)),
        (nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1, output_padding=1), (2, 3, 5)),
        (nn.ConvTranspose2d(3, 2, (3, 2), stride=(2, 3), dilation=2, padding=(0, 1)), (2, 3, 4, 5)),
    ],
    ids=lambda v: str(v) if isinstance(v, nn.Module) else "",
)
def test_rows_times_the_matrix_are_the_outputs(module, shape):
    torch.manual_seed(0)
    module, x = module.double(), torch.randn(shape, dtype=torch.float64)
    dim = 1 if not isinstance(module, nn.Linear) else -1
    wanted = module(x).movedim(dim, -1).flatten(0, -2) - module.bias
    rows, matrix = read_rows(module, x), read_matrix(module)
    torch.testing.assert_close(torch.einsum("ngk,gko->ngo", rows, matrix).flatten(1), wanted)
    chosen = torch.tensor([4, 0, 3])
    torch.testing.assert_close(read_rows(module, x, chosen), rows[chosen])
    before = module.weight.clone()
    write_matrix(module, matrix * 2)
    torch.testing.assert_close(module.weight, before * 2)


# -- which layers, and what reads them ---------------------------------------------------------------


def steps_of(model: nn.Module, x: Tensor) -> dict[str, tuple[str | None, bool, int]]:
    structure = capture(model, x)
    bench = Bench(Averaged(model, structure=structure), model)
    return {s.name: (s.norm.name if s.norm else None, s.rectified, s.calls) for s in bench.steps(x)}


def test_norms_and_rectifiers_are_found_by_what_reads_the_output():
    def forward(m: Net, x: Tensor) -> Tensor:
        y = functional.relu(m.b1(m.c1(x)), inplace=True)
        y = y + m.c2(y)
        y = functional.max_pool2d(m.c3(y), 2).relu()
        z = m.c4(y)
        return m.c5(z.relu() + z)

    model = Net(
        forward, c1=nn.Conv2d(2, 4, 3, padding=1, bias=False), b1=nn.BatchNorm2d(4), c2=nn.Conv2d(4, 4, 1),
        c3=nn.Conv2d(4, 4, 1), c4=nn.Conv2d(4, 4, 1), c5=nn.Conv2d(4, 2, 1),
    ).eval()  # fmt: skip
    assert steps_of(model, torch.randn(2, 2, 4, 4)) == {
        "c1": ("b1", True, 1), "c2": (None, False, 1), "c3": (None, False, 1), "c4": (None, False, 1),
        "c5": (None, False, 1),
    }  # fmt: skip


def test_a_module_may_be_called_several_times_and_tied_weights_stay():
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.out(torch.relu(m.twice(torch.relu(m.twice(m.first(x))))))

    model = Net(forward, first=nn.Linear(3, 5), twice=nn.Linear(5, 5), out=nn.Linear(5, 3)).eval()
    x = torch.randn(4, 3)
    assert steps_of(model, x)["twice"] == (None, True, 2)
    model.out.weight = nn.Parameter(model.first.weight.data.T.clone())
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    tied[2].weight = tied[0].weight
    assert steps_of(tied, torch.randn(2, 4)) == {}


def test_several_calls_are_solved_together():
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.out(torch.tanh(m.twice(torch.tanh(m.twice(m.first(x))))))

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Net(forward, first=nn.Linear(3, 5), twice=nn.Linear(5, 5), out=nn.Linear(5, 2)).double().eval()

    x = torch.randn(64, 3, dtype=torch.float64)
    whole = averaged([build(0), build(1)], x)
    for repair in (Rescale(), Refit()):
        assert Guard(whole, [x]).distance(repair(whole, x).model) < Guard(whole, [x]).distance(whole.model)


def test_soft_couplings_and_the_naive_average_are_repaired_too():
    (a, x), (b, _) = network("mlp"), network("mlp", 1)
    naive = averaged([a, b], x, method="identity")
    spaces = naive.structure.spaces
    soft = {s.name: Plan(torch.full((s.size, s.size), 1 / s.size)) for s in spaces}
    hard = {s.name: Permutation.identity(s.size) for s in spaces}
    mixed = Averaged(
        naive.model, naive.parents, naive.shares, naive.structure, Alignment({"net0": hard, "net1": soft}),
        example_input=x[:2],
    )  # fmt: skip
    for whole in (naive, mixed):
        for repair in (Rescale(), Refit()):
            found = outputs(repair(whole, x).model, x)
            assert found.isfinite().all()
            assert not torch.allclose(found, outputs(naive.model, x))


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("repair", [Rescale(), Refit(), Auto(), BatchNormReset()], ids=repr)
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (torch.zeros(0, 3, 16, 16), "is empty"),
        ([], "is empty"),
        (torch.zeros(1, 3, 16, 16).double(), "only one unlabelled input"),
        (torch.zeros(16, 1, 16, 16).double(), r"shape \(\d+, 1, 16, 16\) do not fit"),
        (torch.zeros(16, dtype=torch.int64), "int64 values .* are they labels"),
        ([{"x": torch.zeros(2, 3, 6, 6)}], "a batch is a dict"),
    ],
)
def test_data_that_does_not_fit_is_refused(repair, data, says):
    (a, x), (b, _) = network("resnet20"), network("resnet20", 1)
    whole = averaged([a, b], x, method="identity")
    before = copy.deepcopy(whole.model.state_dict())
    with pytest.raises(DataError, match=says):
        repair(whole, data)
    assert all(torch.equal(t, before[k]) for k, t in whole.model.state_dict().items())


def test_what_makes_no_sense_is_refused():
    (a, x), (b, _) = network("mlp"), network("mlp", 1)
    whole = averaged([a, b], x)
    for repair in (Rescale(), Refit()):
        with pytest.raises(DataError, match="needs unlabelled inputs"):
            repair(whole, None)
    with pytest.raises(DataError, match="6 rows do not determine 21 weights"):
        Refit(ridge=0)(whole, x[:6])
    with pytest.raises(DataError, match="dead or depend on others"):
        Refit(ridge=0)(whole, torch.zeros_like(x))
    for bad in (lambda: Refit(ridge=-1), lambda: Refit(rounds=0), lambda: Rescale(samples=1), lambda: Auto(samples=1)):
        with pytest.raises(UsageError):
            bad()
    with pytest.raises(UsageError, match="unknown repair 'magic'"):
        make_repair("magic", a)


@pytest.mark.parametrize("method", ["gamf", "activation_matching", "auto"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_data_that_is_not_finite_is_named(method, bad):
    (a, x), (b, _) = network("mlp"), network("mlp", 1)
    spoilt = x.clone()
    spoilt[17, 3] = bad
    with pytest.raises(DataError, match="NaN or infinity among inputs 16 to 31"):
        fuse([a, b], x[:2], method=method, data=list(spoilt.split(16)), progress=False)


@pytest.mark.parametrize("method", ["activation_matching", "auto", "straight_through"])
def test_methods_refuse_labels_in_the_place_of_inputs(method):
    (a, x), (b, _) = network("mlp"), network("mlp", 1)
    with pytest.raises(DataError, match="are they labels"):
        fuse([a, b], x[:2], method=method, data=torch.arange(40) % 5, repair="none", progress=False)


def test_refit_says_where_there_are_fewer_rows_than_weights():
    (a, x), (b, _) = network("mlp"), network("mlp", 1)
    whole = averaged([a, b], x)
    assert "fewer rows" not in Refit()(whole, x).summary
    # Of widths 20, 12 and 9, the first two are more than ten rows.
    assert "; 2 of them had fewer rows than weights an output" in Refit()(whole, x[:10]).summary
    alike = x[:1].expand(48, 20)
    assert all(bool(t.isfinite().all()) for t in Refit()(whole, alike).model.state_dict().values())
    with pytest.raises(DataError, match="dead or depend on others"):
        Refit(ridge=0.0)(whole, alike)


def test_repairs_go_by_name():
    norms, plain = network("resnet20")[0], network("mlp")[0]
    assert make_repair("data", norms) == BatchNormReset()
    assert make_repair("data", plain) == Rescale()
    assert make_repair("refit", plain) == Refit()
    assert make_repair("auto", plain) == Auto()
    assert make_repair("none", plain) == NoRepair()
    assert make_repair(chosen := Refit(samples=9), plain) is chosen
    assert all(callable(make_repair(name, plain)) for name in REPAIRS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_networks_are_repaired_in_wider_sums(dtype):
    (a, x), (b, _) = network("mlp"), network("mlp", 1)
    whole = averaged([copy.deepcopy(m).to(dtype) for m in (a, b)], x.to(dtype))
    for repair in (Rescale(), Refit()):
        found = repair(whole, x).model
        assert {t.dtype for t in found.state_dict().values()} == {dtype}
        assert all(t.isfinite().all() for t in found.state_dict().values())


def test_fusing_reports_the_repair():
    (a, x), (b, _) = network("mlp"), network("mlp", 1)
    result = fuse([a, b], x[:2], data=TensorDataset(x, torch.zeros(len(x))), progress=False)
    assert result.report.repair.startswith("auto: ")
    assert {"none", "data", "refit", "refit+calibrate"} <= set(result.report.repair_numbers["distances"])
    left = fuse([a, b], x[:2], data=x, repair="none", progress=False)
    assert any("was left as averaged" in n for n in left.report.notes)


# -- calibrate and chains ----------------------------------------------------------------------------


def test_a_known_temperature_is_found_and_folded_in():
    (a, x), _ = network("mlp"), None
    whole = averaged([a, a], x)
    hot = copy.deepcopy(a)
    for parameter in hot.layers[-1].parameters():
        parameter.data.mul_(3)
    repaired = Calibrate()(replace(whole, model=hot), x)
    assert repaired.numbers["temperature"] == pytest.approx(3, rel=1e-3)
    torch.testing.assert_close(outputs(repaired.model, x), outputs(a, x), rtol=1e-3, atol=1e-3)
    assert Calibrate()(whole, x).numbers["temperature"] == 1
    assert torch.equal(outputs(repaired.model, x).argmax(1), outputs(hot, x).argmax(1))


def test_no_other_temperature_is_nearer_to_the_ensemble():
    (a, x), (b, _) = network("simple_cnn"), network("simple_cnn", 1)
    whole = averaged([a, b], x, [0.3, 0.7])
    guard, model = Guard(whole, [x]), Calibrate()(whole, x).model
    best = guard.distance(model)
    assert best <= guard.distance(whole.model)
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    for factor in (0.97, 1.03):
        other = copy.deepcopy(model)
        for parameter in [m for m in other.modules() if isinstance(m, nn.Linear)][-1].parameters():
            parameter.data.mul_(factor)
        assert guard.distance(other) > best
    assert last.weight.isfinite().all()


def test_outputs_that_are_no_logits_are_not_calibrated():
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1)).double() for _ in range(2))
    x = torch.randn(32, 4, dtype=torch.float64)
    with pytest.raises(UsageError, match="no vector of logits"):
        Calibrate()(averaged([a, b], x), x)
    c, d = (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.Tanh()).double() for _ in range(2))
    with pytest.raises(UsageError, match="no affine layer of Sequential gives its logits"):
        Calibrate()(averaged([c, d], x), x)
    assert "+calibrate" not in str(Auto()(averaged([c, d], x), x).numbers)


def test_repairs_joined_by_plus_follow_one_another():
    (a, x), (b, _) = network("mlp"), network("mlp", 1)
    whole = averaged([a, b], x)
    joined = make_repair("refit+calibrate", a)(whole, x)
    step = Refit()(whole, x).model
    wanted = Calibrate()(replace(whole, model=step), x).model
    assert all(torch.equal(t, wanted.state_dict()[k]) for k, t in joined.model.state_dict().items())
    assert joined.summary.startswith("refit: ")
    assert "; calibrate: temperature" in joined.summary
    for bad in ("none+data", "refit+auto", "refit+magic", "refit+"):
        with pytest.raises(UsageError):
            make_repair(bad, a)
    with pytest.raises(UsageError, match="empty"):
        Chain(())


# -- without data ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "simple_cnn", "resnet20", "grouped", "depthwise"])
def test_units_get_the_mean_norm_of_their_parents(name):
    (a, x), (b, _) = network(name), network(name, 1)
    whole = averaged([a, b], x, [0.3, 0.7])
    found = WeightNorms()(whole, None).model
    states = {n: transport(m.state_dict(), whole.structure, whole.alignment[n]) for n, m in whole.parents.items()}
    layers = [x for x in find_layers(found, whole.structure) if x.kind == "affine"]
    assert layers
    for layer in layers:
        norms = [states[n][layer.weight].flatten(1).norm(dim=1) for n in whole.parents]
        weight = found.state_dict()[layer.weight].flatten(1)
        torch.testing.assert_close(weight.norm(dim=1), 0.3 * norms[0] + 0.7 * norms[1])
        direction = whole.model.state_dict()[layer.weight].flatten(1)
        torch.testing.assert_close(functional.cosine_similarity(weight, direction), torch.ones(len(weight)).to(weight))


def test_synthetic_pictures_have_a_natural_spectrum():
    noise = make_inputs(torch.zeros(2, 3, 32, 32), 400, seed=1)
    assert noise.shape == (400, 3, 32, 32)
    torch.testing.assert_close(noise.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(noise.std((0, 2, 3)), torch.ones(3))
    power = torch.fft.fft2(noise).abs().square().mean((0, 1))
    assert float(power[0, 2] / power[0, 8]) == pytest.approx(
        64, rel=0.25
    )  # amplitude falls with the frequency to the power of 1.5
    assert 0.85 < float(torch.corrcoef(noise.transpose(0, 1).flatten(1))[0, 1]) < 0.95
    assert torch.equal(noise, make_inputs(torch.zeros(2, 3, 32, 32), 400, seed=1))
    assert not torch.equal(noise, make_inputs(torch.zeros(2, 3, 32, 32), 400, seed=2))


def test_synthetic_tokens_are_those_of_the_example_and_below():
    tokens = make_inputs(torch.tensor([[3, 0, 5]]), 300, seed=0)
    assert tokens.shape == (300, 3)
    assert tokens.dtype == torch.int64
    assert set(tokens.unique().tolist()) == set(range(6))


@pytest.mark.parametrize(
    "example", [{"x": torch.zeros(2, 3)}, (torch.zeros(2), torch.zeros(2)), None, torch.ones(2) > 0]
)
def test_inputs_that_cannot_be_made_are_refused(example):
    with pytest.raises(DataError, match="one tensor of numbers"):
        make_inputs(example, 4, seed=0)


def test_a_synthetic_repair_is_its_repair_on_made_inputs():
    (a, x), (b, _) = network("simple_cnn"), network("simple_cnn", 1)
    whole = averaged([a, b], x, seed=3)
    found = Synthetic(repair=Rescale(), count=20)(whole, None)
    wanted = Rescale()(whole, make_inputs(x, 20, seed=3)).model
    assert all(torch.equal(t, wanted.state_dict()[k]) for k, t in found.model.state_dict().items())
    assert found.summary.startswith("synthetic: ")
    assert "20 synthetic inputs" in found.summary


def seen_by_norms(model: nn.Module, x: Tensor) -> list[tuple[Tensor, nn.BatchNorm2d]]:
    seen: list[tuple[Tensor, nn.BatchNorm2d]] = []
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    hooks = [m.register_forward_pre_hook(lambda m, args: seen.append((args[0].detach(), m))) for m in norms]
    outputs(model, x)
    for hook in hooks:
        hook.remove()
    return seen


def misfit(model: nn.Module, x: Tensor) -> float:
    """As the documentation has it."""
    terms = []
    for given, norm in seen_by_norms(model, x):
        mean, variance = given.mean((0, 2, 3)), given.var((0, 2, 3), correction=0) + norm.eps
        recorded = norm.running_var + norm.eps
        shift = (mean - norm.running_mean).square() / recorded
        terms.append(float((shift + (variance / recorded).log().square() / 4).mean()))
    return sum(terms) / len(terms)


def trained_norms(seed: int) -> tuple[nn.Module, Tensor]:
    """A network whose norms have recorded what they see on inputs that are not noise around 0."""
    model, x = network("resnet20", seed)
    model, x = copy.deepcopy(model), x.abs() * 2 + 0.5
    model.train()
    with torch.no_grad():
        for _ in range(40):
            model(x)
    return model.eval(), x


def test_inverted_inputs_show_norms_what_they_recorded():
    (a, x), (b, _) = trained_norms(0), trained_norms(1)
    whole = averaged([a, b], x, [0.3, 0.7])
    noise = make_inputs(x, 32, seed=0)
    before = [copy.deepcopy(m.state_dict()) for m in (a, b)]
    state, given = torch.random.get_rng_state(), noise.clone()
    found = invert(whole, noise, steps=12, rate=0.2)
    assert found is not None
    assert found.inputs.shape == noise.shape
    assert found.before == pytest.approx(0.3 * misfit(a, noise) + 0.7 * misfit(b, noise))
    assert found.after == pytest.approx(0.3 * misfit(a, found.inputs) + 0.7 * misfit(b, found.inputs))
    assert found.after < 0.5 * found.before
    again = invert(whole, noise, steps=12, rate=0.2)
    assert again is not None
    assert torch.equal(again.inputs, found.inputs)
    assert torch.equal(noise, given)
    assert torch.equal(torch.random.get_rng_state(), state)
    for module, old in zip((a, b), before, strict=True):
        assert all(torch.equal(t, old[k]) for k, t in module.state_dict().items())
        assert all(p.requires_grad and p.grad is None for p in module.parameters())
        assert not any(m._forward_pre_hooks for m in module.modules())


def test_steps_that_lead_nowhere_leave_the_inputs_as_they_were():
    (a, x), (b, _) = trained_norms(0), trained_norms(1)
    noise = make_inputs(x, 32, seed=0)
    found = invert(averaged([a, b], x), noise, steps=3, rate=1e6)
    assert found is not None
    assert found.after <= found.before
    assert bool(found.inputs.isfinite().all())


def test_synthetic_inputs_are_inverted_where_there_are_norms_only():
    (a, x), (b, _) = trained_norms(0), trained_norms(1)
    found = Synthetic(count=32, steps=5)(averaged([a, b], x), None)
    assert found.numbers["misfit"]["after"] < found.numbers["misfit"]["before"]
    assert "fitted to BatchNorm statistics" in found.summary
    plain = Synthetic(count=32, steps=0)(averaged([a, b], x), None)
    assert "misfit" not in plain.numbers
    (a, x), (b, _) = network("simple_cnn"), network("simple_cnn", 1)
    assert invert(averaged([a, b], x), make_inputs(x, 8, seed=0), steps=2, rate=0.1) is None
    for wrong in ({"count": 1}, {"steps": -1}, {"rate": 0.0}):
        with pytest.raises(UsageError):
            Synthetic(**wrong)


# -- what is measured ----------------------------------------------------------------------------------


def test_variances_are_parts_of_the_parents():
    (a, x), (b, _) = network("mlp"), network("mlp", 1)
    whole = averaged([a, b], x, [0.3, 0.7])
    found = fuse([a, b], x[:2], data=x, weights=[0.3, 0.7], method="weight_matching", repair="data", progress=False)
    measured = found.report.repair_numbers["variance"]
    first = [float(m.layers[0](x).var(0, correction=0).mean()) for m in (whole.model, a, b)]
    assert measured["layers.0"]["before"] == pytest.approx(first[0] / (0.3 * first[1] + 0.7 * first[2]))
    assert 0.9 < measured["layers.0"]["after"] <= 1 + 1e-9  # the square of mean deviations is below the mean of squares
    weakest = min(measured, key=lambda n: measured[n]["before"])
    assert f"of the parents' at '{weakest}', the weakest layer" in str(found)


def test_strange_inputs_are_noted():
    (a, x), (b, _) = network("resnet20"), network("resnet20", 1)
    with torch.no_grad():
        for net in (a, b):
            net.train()
            for _ in range(50):
                net(x)
            net.eval()
    usual = fuse([a, b], x[:2], data=x, repair="data", progress=False).report
    strange = fuse([a, b], x[:2], data=x * 40 + 90, repair="data", progress=False).report
    assert not any("preprocessed as in training" in note for note in usual.notes)
    assert any("preprocessed as in training" in note for note in strange.notes)


class NormWithoutGradient(nn.Sequential):
    """A BatchNorm whose answer no gradient leads through."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self[1](self[0](x))
        return self[2](hidden)


def test_inputs_that_no_gradient_reaches_stay_as_they_were_made():
    a, b = (NormWithoutGradient(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval() for _ in range(2))
    x = torch.randn(2, 4)
    whole = averaged([a, b], x)
    assert invert(whole, make_inputs(x, 16, seed=0), steps=2, rate=0.1) is None
    repaired = Synthetic(count=16, steps=2)(whole, None)
    assert "synthetic" in repaired.summary
    assert "misfit" not in repaired.summary
