"""Well-known architectures, a quick part of the reference list: sound, complete, and not less free than published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from structure_study import EXPECTED, prove
from zoo import ZOO

PUBLISHED = Path(__file__).parents[1] / "docs" / "results" / "structure.jsonl"
QUICK = [
    "resnet18",
    "mobilenet_v2",
    "squeezenet1_1",
    "vit_tiny_patch16_224",
    "bert",
    "gpt2",
    "llama",
    "t5",
    "clip",
    "mamba",
    "mixtral",
    "LSTM projected",
    "MultiheadAttention",
    "Transformer",
    "U-Net with pixel shuffle",
]


@pytest.fixture(scope="module")
def published() -> dict[str, dict]:
    return {record["name"]: record for record in map(json.loads, PUBLISHED.read_text().splitlines())}


@pytest.mark.parametrize("name", QUICK)
def test_a_well_known_architecture_keeps_its_function_and_its_freedom(name, published):
    proof = prove(ZOO[name], seed=1)
    assert proof.structure.spaces
    assert proof.change <= proof.tolerance
    if name in EXPECTED:
        assert f"{proof.structure.log10_renumberings:.1f}" == f"{EXPECTED[name]:.1f}"
    else:
        assert proof.structure.free_share >= published[name]["free_share"] - 1e-9
        assert proof.structure.log10_renumberings >= published[name]["log10"] - 1e-6


def test_nothing_that_was_published_is_wrong(published):
    assert set(QUICK) - set(EXPECTED) <= set(published)
    wrong = {name: record for name, record in published.items() if name in ZOO and _bad(record)}
    assert not wrong


def _bad(record: dict) -> bool:
    return "error" in record or record["change"] > record["tolerance"]
