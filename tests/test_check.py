"""The check passes on what capture finds, and fails, naming space and tensor, on structures that are a little wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from networks import NETWORKS, Net, enliven
from weldnet.errors import ModelError, StructureError
from weldnet.structure import Check, Layout, Place, Power, Space, Structure, capture, check, power

Mutation = Callable[[Structure], Structure]


def images() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return enliven(model, x), x


def residual() -> tuple[nn.Module, Tensor]:
    model = Net(
        lambda m, x: m.head((h := torch.relu(m.stem(x))) + m.down(torch.relu(m.up(h)))),
        stem=nn.Linear(5, 6), up=nn.Linear(6, 7), down=nn.Linear(7, 6), head=nn.Linear(6, 3),
    )  # fmt: skip
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return enliven(model, x), x


def named(name: str) -> Callable[[], tuple[nn.Module, Tensor]]:
    return lambda: (NETWORKS[name].model(), NETWORKS[name].example())


# -- ways to be wrong ------------------------------------------------------------------------------


def without(tensor: str, axis: int = 0) -> Mutation:
    def mutate(s: Structure) -> Structure:
        return replace(s, places=tuple(p for p in s.places if p.tensor != tensor or p.axes != (axis,)))

    return mutate


def changed(tensor: str, axes: tuple[int, ...], **changes: object) -> Mutation:
    def mutate(s: Structure) -> Structure:
        here = [p.tensor == tensor and p.axes == axes for p in s.places]
        return replace(s, places=tuple(replace(p, **changes) if h else p for p, h in zip(s.places, here, strict=True)))

    return mutate


def added(space: Space | None, *places: Place) -> Mutation:
    def mutate(s: Structure) -> Structure:
        return replace(s, spaces=s.spaces + ((space,) if space else ()), places=s.places + places)

    return mutate


def split_stream(s: Structure) -> Structure:
    """The residual add no longer ties what comes in to what is added."""
    moved = [replace(p, space="down") if p.tensor.startswith("down") and p.axes == (0,) else p for p in s.places]
    return replace(s, spaces=(*s.spaces, Space("down", 6)), places=tuple(moved))


def swapped_nesting(tensor: str) -> Mutation:
    """Read (group, inner) as (inner, group)."""

    def mutate(s: Structure) -> Structure:
        places = []
        for p in s.places:
            if p.tensor == tensor and p.view is None:
                space = s.space(p.space)
                positions = np.arange(space.size).reshape(space.block, -1).T.reshape(-1, 1)
                p = replace(p, layout=Layout.of(positions))
            places.append(p)
        return replace(s, places=tuple(places))

    return mutate


def swapped_parts(s: Structure) -> Structure:
    """Two halves of a concatenation of equal widths, the wrong way round."""
    offsets = {"a": 5, "b": 0}
    return replace(
        s,
        places=tuple(
            replace(p, layout=Layout(offsets[p.space])) if p.tensor == "head.weight" and p.axes == (1,) else p
            for p in s.places
        ),
    )


def concatenated() -> tuple[nn.Module, Tensor]:
    model = Net(
        lambda m, x: m.head(torch.cat([m.a(x).relu(), m.b(x).tanh()], 1)),
        a=nn.Linear(5, 5), b=nn.Linear(5, 5), head=nn.Linear(10, 3),
    )  # fmt: skip
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return enliven(model, x), x


def exchanged(tensor: str) -> Mutation:
    """Each of two axes of the same length is taken for the other."""

    def mutate(s: Structure) -> Structure:
        turned = [replace(p, axes=(1 - p.axes[0],)) if p.tensor == tensor else p for p in s.places]
        return replace(s, places=tuple(turned))

    return mutate


def no_aliases(s: Structure) -> Structure:
    return replace(s, aliases={})


@dataclass(frozen=True)
class Mutant:
    name: str
    build: Callable[[], tuple[nn.Module, Tensor]]
    mutate: Mutation
    space: str
    tensors: str

    def __str__(self) -> str:
        return self.name


MUTANTS = [
    Mutant("a bias is forgotten", images, without("3.bias"), "3", "'3.weight' or '3.bias'"),
    Mutant(
        "a batch norm buffer is forgotten",
        images,
        without("1.running_mean"),
        "0",
        "'1.weight' or '1.bias' or '1.running_var' or '1.running_mean'",
    ),
    Mutant("inputs are forgotten", images, without("8.weight", 1), "6", "'8.bias' or '8.weight'"),
    Mutant(
        "flattened in the wrong order",
        images,
        changed("6.weight", (1,), layout=Layout(0, 1, 4, 4)),
        "3",
        "'6.weight' or '6.bias'",
    ),
    Mutant(
        "flattened blocks one off",
        images,
        changed(
            "6.weight",
            (1,),
            layout=Layout(table=tuple(tuple((4 * c + p + 1) % 16 for p in range(4)) for c in range(4))),
        ),
        "3",
        "'6.weight' or '6.bias'",
    ),
    Mutant("a residual tie is missing", residual, split_stream, "stem", "'down.bias' or 'down.weight' (at aten.add)"),
    Mutant(
        "inputs are free", images, added(Space("in", 3), Place("0.weight", "in", (1,))), "in", "'0.weight' or '0.bias'"
    ),
    Mutant(
        "outputs are free",
        images,
        added(Space("out", 3), Place("8.weight", "out", (0,)), Place("8.bias", "out", (0,))),
        "out",
        "'8.bias' or '8.weight' (at the order of the outputs)",
    ),
    Mutant(
        "kernel positions are free",
        images,
        added(Space("k", 3), Place("3.weight", "k", (2,))),
        "k",
        "'3.weight' or '3.bias'",
    ),
    Mutant("places on each other's axes", images, exchanged("3.weight"), "0", "'3.weight' or '3.bias'"),
    Mutant("concatenated parts are swapped", concatenated, swapped_parts, "a", "'head.weight' or 'head.bias'"),
    Mutant("a depthwise axis is forgotten", named("depthwise"), without("2.weight"), "0", "'2.bias' or '2.weight'"),
    Mutant(
        "inner and outer are swapped",
        named("grouped"),
        swapped_nesting("0.weight"),
        "0/blocks",
        "'0.weight' or '0.bias'",
    ),
    Mutant("a tied weight is forgotten", named("two_names"), no_aliases, "a", ""),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_the_check_passes_on_the_true_structure(mutant: Mutant):
    model, x = mutant.build()
    result = check(model, x, capture(model, x))
    assert result.error <= result.tolerance == 1e-9
    assert result.inputs == 2
    assert result.renumberings == 2 + len(capture(model, x).roots)
    assert str(result).startswith(f"passed: {result.renumberings} random renumberings on 2 inputs")


def test_one_renumbering_is_spoken_of_as_one():
    said = [str(Check(1e-16, 1e-9, count, 1)) for count in (1, 2)]
    assert "1 random renumbering on 1 input changes the output" in said[0]
    assert "2 random renumberings on 1 input change the output" in said[1]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_the_check_fails_on_a_mutant(mutant: Mutant):
    model, x = mutant.build()
    structure = capture(model, x)
    wrong = mutant.mutate(structure)
    assert wrong != structure
    for seed in range(3):
        with pytest.raises(StructureError) as caught:
            check(model, x, wrong, seed=seed)
        message = str(caught.value)
        assert message.startswith(f"space {mutant.space!r}: renumbering it changes the output by ")
        assert f"the first tensor that no longer fits is {mutant.tensors}" in message
        assert "\n" not in message


def test_a_structure_of_another_model_fails():
    model, x = residual()
    other = Net(lambda m, x: m.head(torch.relu(m.stem(x)) * m.down(torch.relu(m.up(x[:, :1].expand(4, 6)))).cumsum(1)),
                stem=nn.Linear(5, 6), up=nn.Linear(6, 7), down=nn.Linear(7, 6), head=nn.Linear(6, 3))  # fmt: skip
    with pytest.raises(StructureError, match="renumbering it changes the output"):
        check(enliven(other, x), x, capture(model, x))


# -- inputs and precisions -------------------------------------------------------------------------


def test_integer_inputs_are_used_as_they_are():
    network = NETWORKS["embedding"]
    model, ids = network.model(), network.example()
    structure = capture(model, ids)
    assert check(model, ids, structure).error <= 1e-9
    with pytest.raises(StructureError, match="space 'b'"):
        check(model, ids, without("b.bias")(structure))


def test_inputs_by_name_and_in_tuples_are_checked():
    for name in ("two_inputs", "dict_input"):
        network = NETWORKS[name]
        structure = capture(network.model(), network.example())
        assert check(network.model(), network.example(), structure).error <= 1e-9
        with pytest.raises(StructureError):
            check(network.model(), network.example(), without("head.weight", 1)(structure))


def test_a_float32_model_is_checked_in_float64():
    model, x = images()
    structure = capture(model.float(), x.float())
    assert check(model, x.float(), structure).error <= 1e-12
    assert check(model.half(), x.half(), structure).error <= 1e-12
    assert model[0].weight.dtype == torch.float16


def low_precision() -> tuple[nn.Module, Tensor]:
    model = Net(
        lambda m, x: m.head(torch.tanh(m.mix(torch.tanh(m.a(x)).float().mul(1.1).double()))),
        a=nn.Linear(5, 40), mix=nn.Linear(40, 40), head=nn.Linear(40, 3),
    )  # fmt: skip
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return enliven(model, x), x


def test_a_model_that_computes_in_float32_gets_the_wider_tolerance_and_no_more():
    model, x = low_precision()
    structure = capture(model, x)
    result = check(model, x, structure)
    assert result.tolerance == 1e-4
    assert str(result).endswith("1e-04 allowed, as the model computes in lower precision than float64)")
    with pytest.raises(StructureError, match="1e-04 allowed"):
        check(model, x, without("a.bias")(structure))


def test_a_model_that_insists_on_float32_is_checked_in_it():
    model = Net(lambda m, x: m.head(torch.relu(m.a(x) @ torch.ones(6, 6))), a=nn.Linear(5, 6), head=nn.Linear(6, 3))
    x = torch.randn(4, 5)
    result = check(model, x, capture(model, x))
    assert result.tolerance == 1e-4
    assert result.error <= 1e-4


def test_outputs_that_are_not_finite_are_refused():
    model = Net(lambda m, x: torch.log(-m.b(m.a(x)).square()), a=nn.Linear(5, 6), b=nn.Linear(6, 3)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    with pytest.raises(StructureError, match="NaN or Inf on the example input"):
        check(model, x, capture(model, x))


def test_an_example_may_be_the_only_input_that_the_model_answers():
    model, _ = residual()
    logarithmic = Net(lambda m, x: m.inner(torch.log(x)), inner=model)
    x = torch.rand(4, 5, dtype=torch.float64) + 0.1
    structure = capture(logarithmic, x)
    assert check(logarithmic, x, structure).inputs == 1
    with pytest.raises(StructureError):
        check(logarithmic, x, without("inner.up.bias")(structure))


def test_nan_after_renumbering_is_a_failure():
    def forward(m, x):
        h = torch.relu(m.a(x))
        return m.head(h) + torch.sqrt(m.bound[0] - m.bound[1]).mean()

    model = enliven(
        Net(forward, a=nn.Linear(5, 6), head=nn.Linear(6, 3), bound=nn.Parameter(torch.zeros(6))),
        torch.zeros(4, 5).double(),
    )
    model.bound.data.copy_(torch.tensor([6.0, 5, 4, 3, 2, 1]))
    x = torch.randn(4, 5, dtype=torch.float64)
    wrong = added(Space("all", 6), Place("bound", "all", (0,)))(without("bound")(capture(model, x)))
    for seed in range(5):
        with pytest.raises(StructureError, match="space 'all'"):
            check(model, x, wrong, seed=seed)


def test_an_input_that_does_not_fit_is_the_models_error():
    model, x = residual()
    with pytest.raises(ModelError, match=r"fails on the example input float64\[4, 9\]"):
        check(model, torch.zeros(4, 9).double(), capture(model, x))


def test_the_same_seed_sees_the_same_error():
    model, x = images()
    structure = capture(model, x)
    assert check(model, x, structure, seed=4) == check(model, x, structure, seed=4)


# -- power -----------------------------------------------------------------------------------------


def dead() -> tuple[nn.Module, Tensor]:
    """No unit of the first layer ever answers, and nothing reaches the output but its bias."""
    model, x = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(4, 5)
    with torch.no_grad():
        model[0].bias.fill_(-100)
        model[2].bias.zero_()
    return model, x


def zero_started() -> tuple[nn.Module, Tensor]:
    """A residual block that starts as the identity: its last norm's scale and its layer scale are (nearly) zero."""
    model = Net(
        lambda m, x: m.head((h := m.stem(x).relu()) + m.scale[:, None, None] * m.norm(m.conv(h))),
        stem=nn.Conv2d(3, 6, 3), conv=nn.Conv2d(6, 6, 3, padding=1), norm=nn.BatchNorm2d(6),
        scale=nn.Parameter(torch.full((6,), 1e-6)), head=nn.Sequential(nn.Flatten(), nn.Linear(96, 3)),
    )  # fmt: skip
    with torch.no_grad():
        model.norm.weight.zero_()
        model.stem.bias.zero_()
    return model.eval(), torch.zeros(1, 3, 6, 6)


def test_dead_units_hide_a_wrong_structure_from_the_check_but_not_from_the_power():
    model, x = dead()
    structure = capture(model, x)
    wrong = without("2.weight", 1)(structure)
    assert check(model, x, structure).error <= 1e-9
    assert check(model, x, wrong).error <= 1e-9, "units that are dead cannot tell"
    with pytest.raises(StructureError, match=r"space '0': renumbering it .* is '2\.bias' or '2\.weight'"):
        power(model, x, wrong)


@pytest.mark.parametrize("build", [dead, zero_started, images, residual])
def test_every_tensor_has_power_once_activations_live(build: Callable[[], tuple[nn.Module, Tensor]]):
    model, x = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    structure = capture(model, x)
    found = power(model, x, structure)
    assert set(found.by_tensor) == {place.tensor for place in structure.places}
    assert min(found.by_tensor.values()) > 1e-4
    assert (found.share, found.silent, found.deaf) == (1.0, (), ())
    assert found.error <= found.tolerance == 1e-9
    assert found.renumberings >= 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.name not in {"a tied weight is forgotten"}], ids=str)
def test_power_tests_soundness_too(mutant: Mutant):
    model, x = mutant.build()
    with pytest.raises(StructureError, match=f"space {mutant.space!r}: renumbering it changes the output by "):
        power(model, x, mutant.mutate(capture(model, x)))


@pytest.mark.parametrize("name", ["attention_by_hand", "instance_norm", "group_norm_each", "batch_norm_untracked"])
def test_what_the_output_does_not_depend_on_is_deaf_and_not_silent(name: str):
    model, x = named(name)()
    found = power(model, x, capture(model, x))
    assert set(found.deaf) == set(NETWORKS[name].deaf)
    assert found.silent == ()
    assert found.share == 1.0
    assert str(found).splitlines()[1] == f"  the output does not depend on {', '.join(map(repr, found.deaf))}"


def test_the_same_seed_finds_the_same_power():
    model, x = residual()
    structure = capture(model, x)
    assert power(model, x, structure, seed=3) == power(model, x, structure, seed=3)
    assert power(model, x, structure, seed=3) != power(model, x, structure, seed=4)


def test_the_power_is_the_change_that_forgetting_the_tensor_makes():
    """Of two hidden units that answer alike only the last weights tell which is which: swapping those shows in full."""
    model = Net(lambda m, x: (m.a * m.b).sum().reshape(1) + x.sum() * 0, a=nn.Parameter(torch.ones(2)),
                b=nn.Parameter(torch.ones(2)))  # fmt: skip
    x = torch.zeros(1)
    structure = capture(model, x)
    found = power(model, x, structure, seed=3)
    assert found.by_tensor["a"] == pytest.approx(found.by_tensor["b"], rel=1e-9)
    assert 0 < found.by_tensor["a"] < 1


def test_a_tensor_that_barely_shows_is_without_evidence():
    model = Net(
        lambda m, x: m.head(torch.tanh(m.a(x) + m.faint * 1e-9)), a=nn.Linear(5, 6), head=nn.Linear(6, 3),
        faint=nn.Parameter(torch.ones(6)),
    )  # fmt: skip
    found = power(model, torch.zeros(2, 5), capture(model, torch.zeros(2, 5)))
    assert found.weakest is not None
    assert found.weakest[0] == "faint"
    assert 1e-12 < found.weakest[1] < 1e-8
    assert found.silent == ("faint",)
    assert found.deaf == ()
    assert found.share == 3 / 4
    assert str(found).splitlines() == [
        f"weakest evidence: 'faint' {found.weakest[1]:.1e} (power), 1 of 4 tensors without evidence",
        "  the check proves nothing for 'faint'",
    ]


def test_where_the_tolerance_is_wide_evidence_must_exceed_it():
    found = Power({"a": 5e-5, "b": 1e-2}, (), 1e-7, 1e-4, 2)
    assert found.silent == ("a",)
    assert Power({"a": 5e-5, "b": 1e-2}, (), 1e-15, 1e-9, 2).silent == ()


def test_tokens_that_are_all_alike_are_drawn_anew():
    """With equal tokens attention returns what it is given, whatever queries and keys are."""

    def forward(m: Net, ids: Tensor) -> Tensor:
        x = m.embed(ids)
        scores = m.q(x) @ m.k(x).transpose(1, 2)
        return m.head((scores.softmax(-1) @ m.v(x)).relu())

    layers = {name: nn.Linear(5, 6, bias=False) for name in "qkv"}
    model = Net(forward, embed=nn.Embedding(4, 5), head=nn.Linear(6, 3), **layers)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    structure = capture(model, ids)
    found = power(model, ids, structure)
    assert {"q.weight", "k.weight"} <= set(found.by_tensor)
    assert (found.silent, found.deaf) == ((), ())


def test_power_of_a_model_that_answers_only_some_inputs():
    model, _ = residual()
    logarithmic = Net(lambda m, x: m.inner(torch.log(x)), inner=model)
    x = torch.rand(4, 5, dtype=torch.float64) + 0.1
    assert power(logarithmic, x, capture(logarithmic, x)).silent == ()


def test_power_says_so_where_random_weights_give_no_numbers():
    model = Net(lambda m, x: m.head(torch.relu(m.a(x))) / (m.a.weight.sum() - m.a.weight.sum()),
                a=nn.Linear(5, 6), head=nn.Linear(6, 3))  # fmt: skip
    x = torch.ones(1, 5)
    with pytest.raises(StructureError, match="answers with NaN or Inf on random weights"):
        power(model, x, Structure((), (), (), {}))


def test_nothing_moved_is_no_evidence():
    model = nn.Linear(5, 3)
    found = power(model, torch.zeros(1, 5), capture(model, torch.zeros(1, 5)))
    assert (found.by_tensor, found.weakest, found.share) == ({}, None, 1.0)
    assert str(found) == "no evidence: no tensor was moved"
