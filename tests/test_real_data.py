"""The main job on real pictures, small enough for every run; the tables of docs/results come from studies/."""

from __future__ import annotations

import pytest

import weldnet
from weldnet import data, models
from weldnet.evaluation import evaluate
from weldnet.training import Recipe, initialise, train


def train_two(source: str, factory, *, limit: int, epochs: int, lr: float):
    pictures = data.load(source, split="train", limit=limit)
    recipe = [Recipe(epochs=epochs, batch_size=64, lr=lr, seed=seed) for seed in (0, 1)]
    return {
        f"seed{r.seed}": train(initialise(factory, r.seed), pictures, r, progress=False).model for r in recipe
    }, pictures


@pytest.mark.data
def test_aligned_mnist_networks_fuse_where_naive_ones_do_not(data_root, monkeypatch):
    monkeypatch.setenv("WELDNET_DATA", str(data_root))
    networks, pictures = train_two("mnist", lambda: models.build("mlp"), limit=12_000, epochs=4, lr=1e-3)
    test = data.load("mnist", split="test", limit=2_000)
    accuracy = {}
    for method in ("identity", "weight_matching", "gamf"):
        result = weldnet.fuse(networks, pictures.images[:1], method=method, evaluate_on=test)
        accuracy[method] = evaluate(result.model, test).accuracy
        assert result.report.row("fused").scores["accuracy"] == pytest.approx(accuracy[method])
        assert all(row.equivalence <= 1e-9 for row in result.report.rows if row.role == "parent")
    parents = [row.scores["accuracy"] for row in result.report.rows if row.role == "parent"]
    assert min(parents) > 0.93
    assert accuracy["gamf"] > accuracy["identity"] + 0.05
    assert accuracy["gamf"] > min(parents) - 0.03
    assert accuracy["gamf"] > accuracy["weight_matching"] - 0.01


@pytest.mark.data
def test_unlabelled_pictures_restore_batch_norm_networks(data_root, monkeypatch):
    monkeypatch.setenv("WELDNET_DATA", str(data_root))

    def small():
        return models.build("vgg11", width=0.125, batch_norm=True, bias=False)

    networks, pictures = train_two("cifar10", small, limit=4_000, epochs=3, lr=3e-3)
    unlabelled = pictures.images[:512]
    loss = {
        repair: weldnet.fuse(networks, unlabelled[:1], repair=repair, data=unlabelled, evaluate_on=pictures)
        .report.row("fused")
        .scores["loss"]
        for repair in ("none", "data")
    }
    assert loss["data"] < loss["none"]
