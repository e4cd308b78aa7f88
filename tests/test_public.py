"""What users hold in their hands: names, what is printed, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import weldnet
from weldnet import errors
from weldnet.errors import UsageError

X = torch.zeros(1, 4)
DOCS = Path(__file__).resolve().parents[1]


def network(hidden: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 3))


def test_every_public_name_is_there_and_none_else():
    assert len(set(weldnet.__all__)) == len(weldnet.__all__)
    assert dir(weldnet) == sorted(weldnet.__all__)
    assert all(hasattr(weldnet, name) for name in weldnet.__all__)


def test_every_error_that_the_pages_name_can_be_caught_by_it():
    pages = [DOCS / "README.md", *(DOCS / "docs").glob("*.md")]
    named = {word for page in pages for word in re.findall(r"\b[A-Z]\w+Error\b", page.read_text(encoding="utf-8"))}
    assert "StructureError" in named
    for name in named & set(errors.__all__):
        assert getattr(weldnet, name) is getattr(errors, name)


# -- what is printed -------------------------------------------------------------------------------


def test_an_alignment_is_printed_in_a_line():
    a, b = network(), network()
    alignment = weldnet.align([a, b], weldnet.capture(a, X), method="weight_matching")
    share = f"{float((alignment['b']['0'].source != torch.arange(8)).double().mean()):.1%}"
    assert re.search(rf"^WeightMatching\(.*\): 1 space; units moved: a 0.0%, b {share}; objective ", str(alignment))
    assert repr(alignment) == f"<Alignment {alignment}>"
    assert "tensor" not in repr(alignment)


def test_one_is_one_and_not_many():
    a = network()
    headline = str(weldnet.capture(a, X)).splitlines()[0]
    assert headline.startswith("1 space, 3 places in 3 of 4 tensors, ")
    report = str(weldnet.fuse([a, network()], X, progress=False))
    assert "structure  1 space, " in report


def test_a_check_without_spaces_says_that_it_proves_nothing():
    model = nn.Linear(4, 3)
    found = weldnet.check(model, X, weldnet.capture(model, X))
    assert found.renumberings == 0
    assert str(found).startswith("nothing to renumber: the structure has no spaces")


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [network().state_dict(), dict(network().state_dict())], ids=["module's", "dict"])
def test_a_state_dict_is_no_network(given: dict[str, torch.Tensor]):
    structure = weldnet.capture(network(), X)
    for call in (
        lambda: weldnet.capture(given, X),
        lambda: weldnet.fuse([given, given], X),
        lambda: weldnet.check(given, X, structure),
        lambda: weldnet.power(given, X, structure),
    ):
        with pytest.raises(UsageError, match=r"[Dd]ict is given as the network") as caught:
            call()
        assert str(caught.value).endswith("a state dict has no forward pass; build the nn.Module and load it")
        assert "\n" not in str(caught.value)


def test_a_file_is_no_network():
    with pytest.raises(UsageError, match=r"a str is given as the network; give an nn\.Module"):
        weldnet.capture("a.safetensors", X)


# -- routes ----------------------------------------------------------------------------------------


def test_fuse_takes_a_route():
    a, b = network(), network()
    results = [weldnet.fuse([a, b], X, route=route, progress=False) for route in ("dispatch", "export")]
    assert [result.config["route"] for result in results] == ["dispatch", "export"]
    assert all(torch.equal(t, results[1].state_dict()[name]) for name, t in results[0].state_dict().items())
    with pytest.raises(UsageError, match="no route 'fx'"):
        weldnet.fuse([a, b], X, route="fx", progress=False)
