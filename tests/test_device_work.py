"""Training, federations, studies and the command line on a device: the work is done there, results are the CPU's."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from typer.main import get_command

import federations
from accelerator import Accelerator, is_far
from device_cases import DATA, LABELS, conv, far, same_state
from weldnet import experiments, training
from weldnet.checkpoints import save
from weldnet.cli import main
from weldnet.cli._app import app
from weldnet.cli._model import build_model
from weldnet.data import Split
from weldnet.errors import TrainingError
from weldnet.federated import Federation, simulate
from weldnet.records import read
from weldnet.training import Recipe, distil, fine_tune, train
from weldnet.training._objective import Labels
from weldnet.training._run import run
from weldnet.training._tally import Tally

SPLIT = Split(DATA, LABELS, ("a", "b", "c", "d"), "made")
ADAM = Recipe(epochs=2, batch_size=8, lr=0.01, augment="crop-flip", label_smoothing=0.1)


# -- training ----------------------------------------------------------------------------------------


def trained(network: nn.Module, split: Split, device: str | None) -> list[training.TrainingResult]:
    """One of each kind of training."""
    options: dict[str, Any] = {"device": device, "progress": False}
    return [
        train(network, split, ADAM, validation=split, **options),
        fine_tune(network, (split.images, split.labels), Recipe(epochs=1, batch_size=8), **options),
        distil(network, [conv(1), conv(2)], split.images, Recipe(epochs=1, batch_size=8), temperature=2, **options),
    ]


def test_training_on_the_device_gives_what_the_cpu_gives():
    """Bit for bit. Only whether an image fits is tried where the network lies."""
    network = conv()
    here = trained(network, SPLIT, None)
    with Accelerator() as device:
        there = trained(network, SPLIT, "lazy")
    assert device.here == 5 * 3  # five networks, of three layers
    assert device.there > 100
    for a, b in zip(here, there, strict=True):
        assert same_state(a.model, b.model)
        assert [dataclasses.replace(epoch, seconds=0) for epoch in a.history] == [
            dataclasses.replace(epoch, seconds=0) for epoch in b.history
        ]


def test_a_network_on_the_device_is_trained_there():
    (here, tuned, taught), split = trained(conv(), SPLIT, None), SPLIT
    with Accelerator() as device:
        split = Split(DATA.to("lazy"), LABELS.to("lazy"), SPLIT.classes, "made")
        (network,) = far([conv()])
        for expected, found in zip((here, tuned, taught), trained(network, split, None), strict=True):
            assert is_far(found.model)
            assert same_state(found.model, expected.model)
    assert device.here == 2 * 3  # the teachers are on the CPU


def test_training_waits_for_the_device_once_in_many_steps():
    """Not at every step: that would keep it idle while the CPU prepares the next batch."""
    recipe = Recipe(epochs=1, batch_size=1)
    with Accelerator() as few:
        train(conv(), SPLIT.rows(torch.arange(16)), recipe, device="lazy", progress=False)
    with Accelerator() as many:
        train(conv(), SPLIT, recipe, device="lazy", progress=False)
    assert many.asked == few.asked
    assert len(many.fetched) == len(few.fetched)
    assert sum(copied.shape == (1, 3, 8, 8) for copied in many.sent) == 32


def test_an_epoch_sums_all_of_its_steps():
    """Also where they are fetched in three parts."""
    recipe, split = Recipe(epochs=1, batch_size=1), SPLIT.rows(torch.arange(120) % 32)
    here = train(conv(), split, recipe, progress=False).history
    with Accelerator() as device:
        there = train(conv(), split, recipe, device="lazy", progress=False).history
    assert [(epoch.loss, epoch.accuracy) for epoch in here] == [(epoch.loss, epoch.accuracy) for epoch in there]
    assert sum(copied.shape == (50,) for copied in device.fetched) == 2 * 2
    assert sum(copied.shape == (20,) for copied in device.fetched) == 2


def test_a_loss_that_is_not_finite_is_named_by_its_step():
    with Accelerator():
        tally = Tally(3, ADAM)
        right = torch.ones(()).to("lazy")
        for step in range(1, 100):
            tally.add(torch.tensor(math.nan if step == 77 else 0.5).to("lazy"), right, 2)
        # The next time that losses are fetched.
        with pytest.raises(TrainingError, match="became nan in epoch 3, step 77; lower the learning rate"):
            tally.add(right, right, 2)
    assert (tally.loss, tally.correct, tally.seen) == (76.0, 76.0, 152.0)


class Counting(Labels):
    """An objective that gives the number of right answers as a plain one."""

    def __call__(self, logits: Tensor, rows: Tensor, batch: Tensor) -> tuple[Tensor, int]:
        loss, right = super().__call__(logits, rows, batch)
        return loss, int(right)


@pytest.mark.parametrize("device", ["cpu", "lazy"])
def test_right_answers_may_be_a_plain_number(device):
    recipe = Recipe(epochs=1, batch_size=8)
    with Accelerator():
        expected, found = (
            run(conv(), kind(DATA, LABELS, "made", 0.0), recipe, device=device, progress=False).history[0]
            for kind in (Labels, Counting)
        )
    assert (found.loss, found.accuracy) == (expected.loss, expected.accuracy)


def test_a_loss_that_is_not_finite_is_still_named():
    with Accelerator(), pytest.raises(TrainingError, match="epoch 1, step 2; lower the learning rate"):
        train(conv(), SPLIT, Recipe(epochs=1, batch_size=8, lr=1e30, optimizer="sgd"), device="lazy", progress=False)


# -- federations -------------------------------------------------------------------------------------

FEDERATIONS: dict[str, dict[str, Any]] = {
    "joint": {"rule": {"name": "gamf", "anchor": "joint", "gamma": 0.3}, "rounds": 1},
    "activations": {"rule": "activation_matching", "server_rows": 32},
    "refit": {"rule": "fedavg", "repair": "refit", "server_rows": 32},
    "fedprox": {"rule": "fedavg", "algorithm": "fedprox", "server_optimiser": "fedavgm"},
    "moon": {"rule": "fedavg", "algorithm": "moon"},
    "clients align": {"rule": "weight_matching", "align_at": "client"},
    "layers": {"rule": {"name": "fedma", "layers": True}},
}


@pytest.mark.parametrize("changes", FEDERATIONS.values(), ids=FEDERATIONS)
def test_a_federation_runs_on_the_device(changes, tmp_path):
    config = federations.config(train_limit=120, test_limit=40, **changes)
    simulate(config, tmp_path / "here")
    with Accelerator() as device:
        federation = Federation(config.model_copy(update={"device": "lazy"}))
        assert federation.blueprint  # captured on the CPU
        captured = device.here
        simulate(federation.config, tmp_path / "there", federation=federation)
    assert device.here == captured
    assert device.there > 0
    assert federations.same(tmp_path / "here", tmp_path / "there")


# -- studies -----------------------------------------------------------------------------------------

STUDY: dict[str, Any] = {
    "table": "tiny",
    "title": "Two small networks",
    "paper": [],
    "protocol": {
        "dataset": "digits",
        "rows": 100,
        "test_rows": 40,
        "architectures": {"mlp": {"model": "mlp", "options": {"sizes": [64, 8, 10]}}},
        "recipe": {"epochs": 1, "lr": 0.01},
        "partitions": {"homogeneous": {}},
        "networks": {2: 1},
        "methods": ["individual", "weight_matching", "activation_matching"],
        "repairs": ["none", "refit"],
        "samples": 32,
        "barrier": {"points": 3},
        "fine_tuning": {"recipe": {"epochs": 1}, "methods": ["weight_matching"]},
    },
    "scales": {"smoke": {}},
}


def test_a_study_runs_on_the_device(tmp_path):
    """Cells train, align, repair, score and fine-tune there, and measure what they measure on the CPU."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(STUDY))
    study = experiments.resolve(str(tmp_path / "tiny.yaml"), "smoke")
    there = dataclasses.replace(study, protocol=study.protocol.model_copy(update={"device": "lazy"}))
    found: list[list[dict[str, float]]] = []
    for name, chosen in (("here", study), ("there", there)):
        with Accelerator() as device:
            assert not experiments.run_study(chosen, tmp_path / name).failed
        values = [record.values for record in read(tmp_path / name) if record.kind != "network"]
        found.append([{k: v for k, v in each.items() if k not in ("seconds", "memory")} for each in values])
    assert found[0] == found[1]
    assert len(found[0]) > 5
    assert device.there > device.here  # captures and proofs


# -- the command line --------------------------------------------------------------------------------

MODEL = ["--model", "mlp?sizes=64,8,10"]
INPUT = ["--input", "1,1,8,8"]
QUICK = [*INPUT, "--method", "weight_matching"]
ON_DIGITS = [*MODEL, "--data", "digits"]
COMMANDS: dict[str, list[str]] = {
    "fuse": ["fuse", "a.st", "b.st", "-o", "out.st", *ON_DIGITS, *QUICK, "--repair", "refit"],
    "stream": ["fuse", "a.st", "b.st", "-o", "folder", *MODEL, *QUICK, "--stream"],
    "compare": ["compare", "a.st", "b.st", *ON_DIGITS, *INPUT, "--methods", "weight_matching", "--points", "2"],
    "fold": ["fold", "a.st", "-o", "out.st", *ON_DIGITS, "--into", "mlp?sizes=64,6,10", *INPUT],
    "evaluate": ["evaluate", "a.st", "b.st", *ON_DIGITS, "--ensemble"],
    "barrier": ["barrier", "a.st", "b.st", *ON_DIGITS, *QUICK, "--points", "2"],
    "plane": ["plane", "a.st", "b.st", "c.st", *ON_DIGITS, *QUICK, "--points", "2"],
    "train": ["train", "-o", "out.st", *ON_DIGITS, "--epochs", "1"],
    "finetune": ["finetune", "a.st", "-o", "out.st", *ON_DIGITS],
    "distil": ["distil", "a.st", "--parents", "b.st", "c.st", "-o", "out.st", *ON_DIGITS, "--samples", "200"],
    "federate": ["federate", "job.yaml", "-o", "run"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_computes_on_the_device(command, tmp_path, monkeypatch, capsys):
    """All commands with ``--device`` say what they say without it."""
    said: list[Any] = []
    arguments = [part.replace(".st", ".safetensors") for part in COMMANDS[command]]
    device = Accelerator()
    for folder, more in (("here", []), ("there", ["--device", "lazy"])):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        for seed, name in enumerate("abc"):
            save(build_model(MODEL[1], seed=seed).state_dict(), f"{name}.safetensors")
        federations.written(Path(), train_limit=60, test_limit=40, rounds=1)
        with device:
            device.here = device.there = 0
            assert main([*arguments, "--json", *more]) == 0
        said.append(measured(json.loads(capsys.readouterr().out), str(tmp_path / folder)))
    assert said[0] == said[1]
    assert device.there > 0


def measured(document: Any, folder: str) -> Any:
    """Without times, and with paths in the folder."""
    if isinstance(document, dict):
        kept = {k: v for k, v in document.items() if not k.endswith("seconds") and k != "memory"}
        return {key: measured(value, folder) for key, value in kept.items()}
    if isinstance(document, str):
        return document.replace(folder, "")
    return [measured(entry, folder) for entry in document] if isinstance(document, list) else document


def test_a_full_device_is_said_with_the_way_out(tmp_path, monkeypatch, capsys):
    def run(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."
        )

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("weldnet.training.train", run)
    assert main(["train", "-o", "out.safetensors", *ON_DIGITS]) == 1
    assert "CUDA out of memory; give --device cpu" in capsys.readouterr().err


#: Why a command has no ``--device``.
WITHOUT = {
    "demo": "takes seconds on the CPU, and says the same everywhere",
    "inspect": "captures, which is done on the CPU everywhere",
    "check": "proves a structure in float64 on the CPU",
    "report": "draws what was measured",
}


def test_every_command_that_computes_has_the_option():
    commands = get_command(app).commands
    listed = {name for name, command in commands.items() if "device" in {p.name for p in command.params}}
    assert commands.keys() - listed == WITHOUT.keys()
    # Studies are held to it above.
    assert listed - {"reproduce"} == {words[0] for words in COMMANDS.values()}
