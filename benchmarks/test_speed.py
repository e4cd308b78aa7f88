"""Speed, compared within one run: read the ratios, not the seconds.

    make bench

pytest-benchmark prints the medians of each group with their ratios to the fastest in brackets.
"""

from __future__ import annotations

import os

import pytest
import torch

import weldnet
from weldnet import models
from weldnet.affinity import exact_gaussian_affinity, gaussian_affinity
from weldnet.alignment import Gamf, Problem, WeightMatching
from weldnet.alignment._sweeps import Assignments
from weldnet.structure import Space

THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def features(seed: int, d: int) -> torch.Tensor:
    return torch.randn(512, d, generator=torch.Generator().manual_seed(seed))


def direct(a: torch.Tensor, b: torch.Tensor, sigma: float) -> torch.Tensor:
    """The formula as one writes it first, a few rows at a time so that it fits into memory."""
    return torch.cat([torch.exp(-((row[None, None] - b[None]) ** 2) / sigma).sum(-1) for row in a])


AFFINITIES = {
    "expansion": gaussian_affinity,
    "exact, blocked in place": exact_gaussian_affinity,
    "exact, as written": direct,
    "inner product": lambda a, b, sigma: a @ b.T,
}


@pytest.mark.parametrize("kind", AFFINITIES)
@pytest.mark.parametrize("d", [512, 4608])
def test_gaussian_affinity_of_a_512_channel_layer(benchmark, kind, d):
    benchmark.group = f"Gaussian affinity, 512 units x {d} features, sigma = 4 var"
    a, b = features(0, d), features(1, d)
    result = benchmark.pedantic(AFFINITIES[kind], (a, b, 4.0), rounds=3, warmup_rounds=1)
    if kind.startswith("exa") or kind == "expansion":
        exact = exact_gaussian_affinity(a[:16], b, 4.0)
        assert (result[:16] - exact).norm() <= 1e-4 * exact.norm()


@pytest.mark.parametrize("name", ["mlp", "vgg11", "resnet18", "resnet50"])
def test_capture(benchmark, name):
    benchmark.group = "capture"
    model, x = models.build(name), torch.zeros(1, 784) if name == "mlp" else torch.zeros(1, 3, 32, 32)
    benchmark.pedantic(weldnet.capture, (model, x), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize(
    "method",
    [WeightMatching(), Gamf(), Gamf(sigma=4.0), Gamf(affinity="vector")],
    ids=["wm", "gamf", "sigma4", "vector"],
)
def test_align_quarter_vgg11(benchmark, method):
    benchmark.group = "align a quarter-width VGG11 pair (untrained)"
    benchmark.pedantic(method, (problem("vgg11", 2, width=0.25, bias=False),), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_gamf_against_the_number_of_networks(benchmark, count):
    benchmark.group = "gamf, N quarter-width VGG11 (untrained)"
    benchmark.pedantic(Gamf(), (problem("vgg11", count, width=0.25, bias=False),), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [0.25, 0.5, 1.0])
def test_gamf_with_fewer_bits(benchmark, width, precision):
    benchmark.group = f"gamf, VGG11 x {width} (untrained)"
    method = Gamf(precision=precision)
    benchmark.pedantic(method, (problem("vgg11", 2, width=width, bias=False),), rounds=1, warmup_rounds=1)


@pytest.mark.parametrize("count", [1, 2])
def test_linear_assignments_side_by_side(benchmark, count):
    benchmark.group = "eight linear assignments of 1024 units, noise"
    tables = [torch.randn(1024, 1024, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]

    def solve() -> int:
        with Assignments(count) as assignments:
            return len(list(assignments.solve((Space("s", 1024), table) for table in tables)))

    assert benchmark.pedantic(solve, rounds=3, warmup_rounds=1) == len(tables)


def problem(name: str, count: int, **options) -> Problem:
    networks = [models.build(name, **options) for _ in range(count)]
    structure = weldnet.capture(networks[0], torch.zeros(1, 3, 32, 32))
    return Problem(structure, {str(i): n.state_dict() for i, n in enumerate(networks)})
