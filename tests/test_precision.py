"""Products in less than float32: how near they are, when float32 takes over, and that results are as good."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weldnet
from test_laws import NETWORKS, renumbered
from test_products import CASES, ascent_of, couple, unfolded
from weldnet import models
from weldnet.affinity import InnerProduct
from weldnet.alignment import Gamf, Problem, WeightMatching, transport
from weldnet.alignment import _rough as precision
from weldnet.alignment._products import BrickPool
from weldnet.alignment._rough import Rough, in_float32
from weldnet.errors import UsageError

CPU = torch.device("cpu")


def vgg(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return models.build("vgg11", width=0.125, bias=False)


def problem(count: int) -> Problem:
    networks = [vgg(seed) for seed in range(count)]
    structure = weldnet.capture(networks[0], torch.zeros(1, 3, 32, 32))
    return Problem(structure, {str(i): network.state_dict() for i, network in enumerate(networks)})


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_some_rows_of_the_scores_are_rows_of_all_of_them(case, count):
    ascent, generator = ascent_of(case, count), torch.Generator().manual_seed(1)
    ascent.soften()
    for space in ascent.structure.roots:
        for k in ascent.moving:
            couple(ascent, space.name, k, generator, soft=True)
    rows = torch.tensor([0, 2])
    ascent.multiply_with(Rough(in_float32, in_float32))
    for space in ascent.structure.roots:
        pool = ascent.pool(space, InnerProduct())
        for k in ascent.moving:
            parts = [(e.weight, e.pool.checked_scores(k, rows)) for e in pool.entries if isinstance(e.pool, BrickPool)]
            assert len(parts) == len(pool.entries)
            expected = unfolded(ascent, space.name, k)
            whole, some = (sum(weight * found[i] for weight, found in parts) for i in (0, 1))
            torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(some, expected[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [2, 3])
def test_rough_scores_are_within_a_hundredth_of_their_spread(count):
    ascent, generator = ascent_of("vgg11", count), torch.Generator().manual_seed(1)
    ascent.soften()
    rough = Rough.of("bfloat16", CPU)
    for space in ascent.structure.roots:
        couple(ascent, space.name, 1, generator, soft=True)
    ascent.multiply_with(rough)
    for space in ascent.structure.roots:
        expected = unfolded(ascent, space.name, 1)
        found = ascent.pool(space, InnerProduct()).scores(1)
        assert not torch.equal(found, expected)
        off = (found - expected) - (found - expected).mean(1, keepdim=True)
        assert off.std() < 0.012 * (expected - expected.mean(0)).std()
    assert rough is not None
    assert not rough.exact


@pytest.mark.parametrize("count", [2, 4])
def test_annealing_in_bfloat16_ends_as_high(count):
    exact, rough = Gamf()(problem(count)), Gamf(precision="bfloat16")(problem(count))
    assert rough.stats["float32_spaces"] == []
    assert "float32_spaces" not in exact.stats
    assert rough.stats["objective"] == pytest.approx(exact.stats["objective"], rel=0.02)
    assert rough.stats["objective"] > 1.02 * WeightMatching()(problem(count)).stats["objective"]


def test_planted_copies_come_back():
    network = NETWORKS[1]
    original = network.state(1)
    states = {"a": original, "b": renumbered(network, original, 3), "c": renumbered(network, original, 4)}
    alignment = Gamf(precision="bfloat16")(network.problem(states))
    for name in "bc":
        back = transport(states[name], network.structure, alignment[name])
        assert all(torch.equal(back[key], tensor) for key, tensor in original.items())


@pytest.mark.parametrize("count", [2, 3])
def test_where_products_are_too_far_off_float32_takes_over_and_ends_where_it_always_does(count, monkeypatch):
    calls = [0]

    def coarse(a: Tensor, b: Tensor, less: Tensor | None = None) -> Tensor:
        calls[0] += 1
        product = (a @ b).mul(4).round().div(4)
        return product if less is None else less - product

    monkeypatch.setattr(precision, "_in_bfloat16", coarse)
    exact, rough = Gamf()(problem(count)), Gamf(precision="bfloat16")(problem(count))
    spaces = [space.name for space in problem(count).structure.roots]
    assert rough.stats["float32_spaces"] == sorted(spaces)
    assert 0 < calls[0] < 100  # each space tries once
    assert rough.stats["objective"] == exact.stats["objective"]
    for name, couplings in exact.couplings.items():
        assert all(torch.equal(c.matrix(), rough[name][space].matrix()) for space, c in couplings.items())


def test_scores_that_hardly_differ_are_not_left_to_bfloat16():
    scores = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    rough = Rough.of("bfloat16", CPU)
    assert rough is not None
    rows = rough.rows(64, CPU)
    assert len(rows) == 4
    near = scores.bfloat16().float()
    assert rough.is_near(near, rows, scores[rows])
    assert not rough.is_near((scores + 100).bfloat16().float(), rows, scores[rows] + 100)
    offset = torch.linspace(-50, 50, 64)[:, None]
    assert rough.is_near(near + offset, rows, scores[rows])  # which no coupling depends on
    assert not rough.is_near(torch.ones(64, 64), rows, torch.zeros(4, 64) + torch.eye(4, 64))


@pytest.fixture
def cuda_products():
    settings: Any = torch.backends.cuda.matmul
    before = settings.fp32_precision
    yield settings
    settings.fp32_precision = before


@pytest.mark.parametrize("users", ["ieee", "tf32"])
def test_tf32_and_what_it_is_held_to_ask_for_what_they_are_and_give_back_what_was_there(users, cuda_products):
    cuda_products.fp32_precision = users
    asked: list[str] = []

    class Watched(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked.append(torch.backends.cuda.matmul.fp32_precision)
            return super().__torch_function__(func, types, args, kwargs or {})

    watched, ones = torch.eye(3).as_subclass(Watched), torch.ones(3, 3)
    rough = Rough.of("tf32", torch.device("cuda"))
    assert rough is not None
    for multiply, kind in ((rough.multiply, "tf32"), (rough.check, "ieee")):
        asked.clear()
        assert torch.equal(multiply(watched, ones).as_subclass(Tensor), ones)
        assert torch.equal(multiply(watched, ones, ones).as_subclass(Tensor), torch.zeros(3, 3))
        assert kind in asked
        assert torch.backends.cuda.matmul.fp32_precision == users
        with pytest.raises(RuntimeError):
            multiply(torch.ones(2, 3), torch.ones(2, 3))
        assert torch.backends.cuda.matmul.fp32_precision == users


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match=r"tf32.*cpu.*bfloat16"):
        Gamf(precision="tf32")(problem(2))
    with pytest.raises(UsageError, match="precision is 'half'; give float32, tf32, bfloat16"):
        Gamf(precision="half")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="sigma and affinity"):
        Gamf(precision="bfloat16", sigma=4.0)
    with pytest.raises(UsageError, match="sigma and affinity"):
        Gamf(precision="bfloat16", affinity="vector")


def test_a_device_without_tf32_is_refused_before_anything_else_is_done(tmp_path):
    """Networks without a forward pass, and files that are not there, are found later."""
    nets, x, method = [nn.Module(), nn.Module()], torch.zeros(1, 4), Gamf(precision="tf32")
    with pytest.raises(UsageError, match=r"tf32.*cpu.*bfloat16"):
        weldnet.fuse(nets, x, method=method)
    with pytest.raises(UsageError, match=r"tf32.*cpu.*bfloat16"):
        weldnet.fuse_files(["no", "none"], x, model=nn.Module, out=tmp_path / "out", method=method)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match=r"activations=1.0 looks at activations.*data="):
        weldnet.fuse(nets, x, method=Gamf(activations=1.0))
