"""Matched averaging: the assignment is the most likely one, and units grow where networks disagree."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import weldnet
from test_laws import ATTENTION, GROUPED, MLP, NETWORKS, difference, renumbered
from weldnet import models
from weldnet.alignment import MatchedAveraging, Problem
from weldnet.alignment.matched_averaging import Globals
from weldnet.assignment import targets_of
from weldnet.checkpoints import save
from weldnet.cli import main
from weldnet.errors import FusionError, UsageError
from weldnet.fusion import fuse

SETTINGS = {"sigma": 0.7, "sigma0": 1.3, "gamma": 2.0}


def pool_of(generator, *, networks=3, d=5):
    """Global units of two networks, one of which has three units more than the other shares."""
    precision, prior = SETTINGS["sigma"] ** -2, SETTINGS["sigma0"] ** -2
    empty = torch.zeros(0, d, dtype=torch.float64)
    pool = Globals(precision, prior, SETTINGS["gamma"], networks, empty, empty.new_zeros(0))
    for targets in (torch.arange(4), torch.tensor([0, 4, 2, 5])):
        pool.add(torch.randn(4, d, generator=generator, dtype=torch.float64), targets)
    return pool


def log_posterior(pool, rows, targets):
    """What a network's units add to the log posterior, from the formula (up to what no assignment changes)."""
    sigma, sigma0, gamma = SETTINGS.values()
    total, known = 0.0, len(pool.counts)
    for row, target in zip(rows, targets, strict=True):
        own = row / sigma**2
        if target < known:
            m, s = float(pool.counts[target]), pool.totals[target]
            g = 1 / sigma0**2 + m / sigma**2
            total += float((s + own).square().sum()) / (g + 1 / sigma**2) - float(s.square().sum()) / g
            total += 2 * math.log(m / (pool.networks - m))
        else:
            k = target - known + 1
            total += float(own.square().sum()) / (1 / sigma0**2 + 1 / sigma**2)
            total += 2 * math.log(gamma / pool.networks) - 2 * math.log(k)
    return total


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("growth", [False, True])
def test_the_assignment_is_the_most_likely_of_all(seed, growth):
    generator = torch.Generator().manual_seed(seed)
    pool = pool_of(generator)
    rows = 1.5 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    places = range(len(pool.counts) + (4 if growth else 0))
    best = max(log_posterior(pool, rows, targets) for targets in itertools.permutations(places, 4))
    found = pool.match(rows, growth=growth)
    assert len(set(found.tolist())) == 4
    assert log_posterior(pool, rows, found.tolist()) == pytest.approx(best, rel=1e-12)


def test_units_taken_out_leave_no_trace():
    pool = pool_of(torch.Generator().manual_seed(0))
    totals, counts = pool.totals.clone(), pool.counts.clone()
    rows, targets = torch.randn(3, 5, dtype=torch.float64), torch.tensor([1, 0, 5])
    pool.add(rows, targets)
    assert not torch.equal(pool.counts, counts)
    pool.add(rows, targets, sign=-1)
    torch.testing.assert_close(pool.totals, totals)
    assert torch.equal(pool.counts, counts)


# -- growth ----------------------------------------------------------------------------------------


def answers(model, network):
    with torch.no_grad():
        return model(network.inputs)


@pytest.mark.parametrize("network", [n for n in NETWORKS if str(n) in ("mlp", "residual", "depthwise")], ids=str)
def test_with_much_mass_for_new_units_every_network_keeps_its_own(network):
    parents = [network.model(seed) for seed in (1, 2, 3)]
    method = MatchedAveraging(growth=True, gamma=1e30)
    result = fuse(parents, network.inputs, method=method, repair="none", progress=False)
    assert all(after == 3 * before for before, after in result.report.size.apart.values())
    expected = sum(answers(p, network) for p in parents) / 3
    assert difference(answers(result.model, network), expected) <= 1e-12


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_renumbered_copies_do_not_grow(network):
    state = network.state(1)
    states = {"a": state, "b": renumbered(network, state, 3), "c": renumbered(network, state, 4)}
    large = {n: {k: 30 * t if t.is_floating_point() else t for k, t in s.items()} for n, s in states.items()}
    alignment = MatchedAveraging(growth=True)(Problem(network.structure, large))
    for name, spaces in alignment.couplings.items():
        for space, coupling in spaces.items():
            assert coupling.matrix().shape[0] == coupling.matrix().shape[1], f"{space} grew for {name}"
    assert alignment.stats["converged"] is True


def test_only_units_that_another_network_lacks_are_new():
    a = MLP.model(1)
    state = {k: t.clone() for k, t in a.state_dict().items()}
    state["0.weight"][[2, 5]] = -state["0.weight"][[2, 5]]
    state["0.bias"][[2, 5]] = -state["0.bias"][[2, 5]]
    other = renumbered(MLP, state, 7)
    large = [{k: 30 * t for k, t in s.items()} for s in (a.state_dict(), other)]
    alignment = MatchedAveraging(growth=True)(Problem(MLP.structure, dict(zip("ab", large, strict=True))))
    assert alignment["a"]["0"].matrix().shape == (9, 11)
    own = targets_of(alignment["a"]["0"])
    assert torch.equal(own, torch.arange(9)), "the first network's units do not come first"
    lacking = set(own.tolist()) - set(targets_of(alignment["b"]["0"]).tolist())
    assert lacking == {2, 5}


def test_the_grown_network_is_saved_loaded_and_reported(tmp_path):
    parents = [MLP.model(seed) for seed in (1, 2)]
    result = fuse(parents, MLP.inputs, method="matched_averaging", growth=True, progress=False)
    assert result.report.size.used > 1
    assert result.model[0].out_features == result.report.size.apart["0"][1] > 9
    result.save(tmp_path / "grown.safetensors")
    again = weldnet.load_model(tmp_path / "grown.safetensors", MLP.model(0)).eval()
    assert torch.equal(answers(again, MLP), answers(result.model, MLP))
    assert "in use" in str(result)


def test_growth_decides_the_size_itself():
    parents = [MLP.model(seed) for seed in (1, 2)]
    with pytest.raises(UsageError, match=r"size is 1\.5, but MatchedAveraging"):
        fuse(parents, MLP.inputs, method=MatchedAveraging(growth=True), size=1.5, progress=False)
    plain = fuse(parents, MLP.inputs, method=MatchedAveraging(), size=1.5, progress=False)
    assert plain.report.size.apart


def test_spaces_that_cannot_grow_are_named():
    parents = [nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3)) for _ in range(2)]
    method = MatchedAveraging(growth=True, gamma=1e30)
    with pytest.raises(FusionError, match=r"space '0' cannot grow: .*; align without growth"):
        fuse(parents, torch.randn(2, 4), method=method, progress=False)


@pytest.mark.parametrize("network", [GROUPED, ATTENTION], ids=str)
def test_nested_units_and_those_beside_them_do_not_grow(network):
    parents = [network.model(seed) for seed in (1, 2)]
    result = fuse(parents, network.inputs, method=MatchedAveraging(growth=True, gamma=1e30), progress=False)
    apart = result.report.size.apart if result.report.size else {}
    assert list(apart) == (["up"] if network is ATTENTION else [])


def test_settings_that_make_no_sense_are_refused():
    for option, value in (("sigma", 0.0), ("sigma0", -1.0), ("gamma", math.inf), ("sweeps", 0)):
        with pytest.raises(UsageError, match=option):
            MatchedAveraging(**{option: value})


def test_the_command_line_grows_networks(tmp_path, capsys):
    files, model = [], "mlp?sizes=64,12,10"
    for seed in (0, 1):
        torch.manual_seed(seed)
        files.append(tmp_path / f"{seed}.safetensors")
        save(models.build("mlp", sizes=(64, 12, 10)).state_dict(), files[-1])
    out = tmp_path / "grown.safetensors"
    words = ["fuse", *files, "--model", model, "--input", "1,64", "-o", out, "--method", "matched_averaging"]
    assert main([*map(str, words), "--option", "growth=true"]) == 0
    assert "in use" in capsys.readouterr().out
    assert main(["evaluate", str(out), "--model", model, "--data", "digits"]) == 0
