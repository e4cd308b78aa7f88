"""Commands that judge networks: evaluate, barrier, plane, spaces, compare, finetune and distil."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from weldnet import checkpoints
from weldnet.alignment import AUTO, Identity
from weldnet.cli import main
from weldnet.cli._model import build_model
from weldnet.errors import AlignmentError

MODEL = "mlp?sizes=64,12,10"
BASE = ("--model", MODEL, "--input", "1,1,8,8")


@pytest.fixture
def cli(capsys):
    """Run a command line in this process; give its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def trio(tmp_path, monkeypatch) -> tuple[Path, Path, Path]:
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        checkpoints.save(build_model(MODEL, seed=seed).state_dict(), f"{name}.safetensors")
    return Path("a.safetensors"), Path("b.safetensors"), Path("c.safetensors")


def test_evaluate_says_how_often_networks_agree(cli, trio):
    arguments = ("evaluate", *trio[:2], "--model", MODEL, "--data", "digits", "--ensemble")
    code, out, err = cli(*arguments)
    assert code == 0, err
    assert "calibration error" in out
    assert "share of samples with the same answer" in out
    document = json.loads(cli(*arguments, "--json")[1])
    a, b = document["networks"]
    assert a["agreement"]["a"] == b["agreement"]["b"] == 1
    assert a["agreement"]["b"] == b["agreement"]["a"] < 1
    assert 0 < a["agreement_with_ensemble"] <= 1
    assert 0 < document["ensemble"]["calibration_error"] < 1


def test_one_network_has_nobody_to_agree_with(cli, trio):
    code, out, _ = cli("evaluate", trio[0], "--model", MODEL, "--data", "digits")
    assert code == 0
    assert "the same answer" not in out


def test_barrier_has_height_and_area_of_25_points(cli, trio):
    document = json.loads(cli("barrier", *trio[:2], *BASE, "--data", "digits", "--json")[1])
    assert len(document["after"]["points"]) == len(document["after"]["accuracy"]) == 25
    assert 0 <= document["after"]["area"] <= document["after"]["barrier"]


def test_plane_prints_a_grid_with_the_networks(cli, trio):
    arguments = ("plane", *trio, *BASE, "--data", "digits", "--points", 3, "--margin", 0)
    code, out, err = cli(*arguments)
    assert code == 0, err
    assert "c at x" in out
    document = json.loads(cli(*arguments, "--json")[1])
    assert [len(row) for row in document["loss"]] == [3, 3, 3]
    assert document["x"][0] == 0
    assert document["corners"][0] == [0, 0]
    # Without a margin the lower left corner of the grid is the first network.
    assert document["loss"][0][0] == pytest.approx(document["corner_loss"][0], rel=1e-5)
    raw = json.loads(cli(*arguments, "--json", "--method", "identity")[1])
    assert raw["corners"][1] != document["corners"][1]
    assert raw["corner_loss"] == pytest.approx(document["corner_loss"], rel=1e-4)


def test_plane_refuses_networks_on_a_line(cli, trio):
    code, out, err = cli("plane", trio[0], trio[0], trio[1], *BASE, "--data", "digits")
    assert (code, out) == (1, "")
    assert "lie on one line" in err.splitlines()[-1]


def test_fuse_prints_how_well_each_space_was_matched(cli, trio):
    arguments = ("fuse", *trio[:2], "-o", "fused.pt", *BASE)
    assert "match quality" not in cli(*arguments)[1]
    code, out, err = cli(*arguments, "--spaces", "--method", "auto")
    assert code == 0, err
    assert "match quality" in out
    assert f"{AUTO['without data'].method} (auto: " in out
    (row,) = json.loads(cli(*arguments, "--json")[1])["diagnosis"]
    assert row["units"] == 12
    assert row["quality"] > row["unaligned"]


@pytest.mark.parametrize(
    ("method", "says"),
    [("activation_matching", "activation_matching"), ("auto", f"{AUTO['with data'].method} ")],
)
def test_methods_get_unlabelled_images_where_nothing_is_repaired(cli, trio, method, says):
    arguments = ("fuse", *trio[:2], "-o", "fused.pt", *BASE, "--repair", "none", "--method", method, "--json")
    code, out, err = cli(*arguments, "--data", "digits")
    assert code == 0, err
    document = json.loads(out)
    assert document["method"].startswith(says)
    assert document["repair"] == "none"
    code, _, err = cli(*arguments)
    assert code == (0 if method == "auto" else 2)
    assert method == "auto" or "unlabelled inputs" in err


# -- compare -----------------------------------------------------------------------------------------


@pytest.fixture
def broken(monkeypatch):
    """Let the method identity fail."""

    def fail(method, problem):
        raise AlignmentError("no luck today")

    monkeypatch.setattr(Identity, "__call__", fail)


def test_compare_shows_every_combination(cli, trio):
    arguments = ("compare", *trio[:2], *BASE, "--data", "digits", "--methods", "identity,weight_matching")
    code, out, err = cli(*arguments, "--repairs", "auto,none", "--points", 3)
    assert code == 0, err
    assert "parent a" in out
    assert "ensemble" in out
    arguments = (*arguments, "--repairs", "none", "--points", 3, "--json", "--sort", "method")
    document = json.loads(cli(*arguments)[1])
    assert [row["method"] for row in document["rows"]] == ["identity", "weight_matching"]
    assert [row["role"] for row in document["references"]] == ["parent", "parent", "ensemble"]
    assert all(row["barrier"] >= 0 and row["seconds"] > 0 and row["error"] is None for row in document["rows"])
    method = ("--method", "identity", "--repair", "none")
    fused = json.loads(cli("fuse", *trio[:2], "-o", "f.pt", *BASE, "--data", "digits", "--json", *method)[1])
    assert document["rows"][0]["scores"] == fused["rows"][-1]["scores"]


def test_compare_takes_options_of_methods(cli, trio):
    arguments = ("compare", *trio[:2], *BASE, "--data", "digits", "--points", 0, "--repairs", "none", "--json")
    both = "gamf:sigma=4:tau=0.5,gamf,optimal_transport:on=activations"
    code, out, err = cli(*arguments, "--methods", both, "--sort", "method")
    assert code == 0, err
    rows = {row["method"]: row for row in json.loads(out)["rows"]}
    assert list(rows) == ["gamf", "gamf sigma=4 tau=0.5", "optimal_transport on='activations'"]
    assert rows["optimal_transport on='activations'"]["samples"] > 0
    options = ("--option", "sigma=4", "--option", "tau=0.5", "--repair", "none")
    fused = json.loads(cli("fuse", *trio[:2], "-o", "f.pt", *BASE, "--data", "digits", "--json", *options)[1])
    assert rows["gamf sigma=4 tau=0.5"]["scores"] == fused["rows"][-1]["scores"]


def test_compare_names_what_failed_and_goes_on(cli, trio, broken):
    arguments = ("compare", *trio[:2], *BASE, "--data", "digits", "--points", 0)
    code, out, _ = cli(*arguments, "--methods", "identity,weight_matching", "--repairs", "auto,none")
    assert code == 0
    assert "failed     identity with auto: no luck today" in out
    assert "failed     identity with none: no luck today" in out


def test_compare_fails_if_no_combination_works(cli, trio, broken):
    code, out, err = cli("compare", *trio[:2], *BASE, "--data", "digits", "--methods", "identity", "--points", 0)
    assert code == 1
    assert "failed     identity with auto: no luck today" in out
    assert err.splitlines()[-1] == "weldnet: error: no combination worked; the rows say why"


def test_compare_writes_its_table_in_the_format_of_the_suffix(cli, trio):
    arguments = ("compare", *trio, *BASE, "--data", "digits", "--methods", "identity", "--points", 0)
    printed = cli(*arguments, "--csv", "-o", "t.json")[1]
    (row,) = csv.DictReader(printed.splitlines())
    assert row["method"] == "identity"
    assert row["barrier"] == row["error"] == ""
    assert float(row["accuracy"]) == json.loads(Path("t.json").read_text())["rows"][0]["scores"]["accuracy"]
    code, _, err = cli(*arguments, "-o", "t.csv")
    assert (code, err.splitlines()[-1]) == (0, "weldnet: wrote t.csv")
    assert Path("t.csv").read_text().splitlines()[0] == printed.splitlines()[0]
    assert cli(*arguments, "-o", "t.txt")[0] == 0
    assert Path("t.txt").read_text().startswith("comparison")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "gmf"], "did you mean 'gamf'"),
        (["--repairs", "nothing"], "--repairs: unknown name 'nothing'"),
        (["--methods", ","], "names nothing"),
        (["--methods", "gamf:sgima=4"], "did you mean 'sigma'"),
        (["--methods", "gamf:sigma=wide"], "give a number"),
        (["--methods", "gamf:sigma"], "'sigma' in 'gamf:sigma' is not KEY=VALUE"),
        (["--methods", "auto:sigma=4"], "name the method"),
        (["--sort", "acuracy"], "did you mean 'accuracy'"),
        (["--points", "1"], "--points 1 is no line"),
        (["--csv", "--json"], "give one of them"),
        (["-o", "table.xlsx"], ".csv"),
        (["-o", "table.json/x.csv"], None),
    ],
)
def test_compare_refuses_what_cannot_be_meant_before_it_starts(cli, trio, arguments, words):
    Path("table.json").write_text("")
    code, out, err = cli("compare", *trio[:2], *BASE, "--data", "digits", *arguments)
    assert (code, out) == (2 if words else 1, "")
    assert (words or "table.json") in err
    assert err.count("\n") == 1


def test_compare_needs_two_networks(cli, trio):
    code, _, err = cli("compare", trio[0], *BASE, "--data", "digits")
    assert code == 2
    assert "two networks or more" in err


# -- after fusing ------------------------------------------------------------------------------------

PARENTS = ("--parents", "a.safetensors", "b.safetensors")
AFTER = pytest.mark.parametrize("command", [("finetune",), ("distil", *PARENTS)], ids=lambda words: words[0])


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@AFTER
def test_a_short_training_makes_the_network_better_and_says_where_it_comes_from(cli, trio, command):
    for seed, file in enumerate(trio[:2]):
        assert cli("train", "--model", MODEL, "--data", "digits", "-o", file, "--lr", 0.01, "--seed", seed)[0] == 0
    assert cli("fuse", *trio[:2], *BASE, "-o", "f.pt")[0] == 0
    arguments = (command[0], "f.pt", *command[1:], "--model", MODEL, "--data", "digits", "-o", "out.safetensors")
    code, out, err = cli(*arguments, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["after"]["loss"] < document["before"]["loss"]
    assert "weldnet: epoch 1/" in err
    metadata = checkpoints.read_metadata("out.safetensors")
    files = ["f.pt", "a.safetensors", "b.safetensors"] if command[0] == "distil" else ["f.pt"]
    assert [entry["file"] for entry in json.loads(metadata["parents"])] == files
    assert json.loads(metadata["config"])["made_by"] == command[0]
    assert not Path("out.safetensors.state").exists()
    first = checkpoints.load("out.safetensors")
    code, out, err = cli(*arguments)
    assert code == 0, err
    assert out.startswith("before accuracy ")
    assert same(checkpoints.load("out.safetensors"), first)
    assert cli(*arguments, "--seed", 1)[0] == 0
    assert not same(checkpoints.load("out.safetensors"), first)


@AFTER
def test_an_interrupted_training_goes_on_with_resume_to_the_same_network(cli, trio, command, monkeypatch):
    arguments = (command[0], trio[2], *command[1:], "--model", MODEL, "--data", "digits", "--epochs", 3)
    assert cli(*arguments, "-o", "whole.pt")[0] == 0
    replaced, left = os.replace, [2]

    def stop_after_two(source, target):
        replaced(source, target)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_after_two)
        code, _, err = cli(*arguments, "-o", "parts.pt")
    assert code == 130
    assert "go on with --resume, the state is in parts.pt.state" in err
    assert not Path("parts.pt").exists()
    code, _, err = cli(*arguments, "-o", "parts.pt", "--resume", "--lr", 1)
    assert code == 1
    assert "remove that file to start afresh" in err
    code, _, err = cli(*arguments, "-o", "parts.pt")
    assert code == 2
    assert "'parts.pt.state' is an unfinished training" in err
    assert cli(*arguments, "-o", "parts.pt", "--resume")[0] == 0
    assert same(checkpoints.load("whole.pt"), checkpoints.load("parts.pt"))


def test_every_word_after_parents_is_a_parent(cli, trio):
    rest = ("--model", MODEL, "--data", "digits", "-o", "out.pt", "--epochs", 1)
    code, _, err = cli("distil", *PARENTS, "c.safetensors", *rest)
    assert code == 2
    assert "Missing argument 'FUSED'" in err
    for words in (("c.safetensors", *PARENTS), ("c.safetensors", "--parents", trio[0], "--parents", trio[1])):
        assert cli("distil", *words, *rest)[0] == 0


def test_after_fusing_what_cannot_be_meant_is_refused(cli, trio):
    rest = ("--model", MODEL, "--data", "digits")
    assert "Missing option '--parents'" in cli("distil", trio[0], *rest, "-o", "out.pt")[2]
    assert "--parents names no file" in cli("distil", trio[0], "--parents", *rest, "-o", "out.pt")[2]
    assert "--parents names no file" in cli("distil", trio[0], *rest, "-o", "out.pt", "--parents")[2]
    for command in (("finetune", trio[0]), ("train",), ("distil", trio[0], *PARENTS)):
        code, _, err = cli(*command, *rest, "-o", "out.pt", "--epochs", 0)
        assert code == 2
        assert "'--epochs': 0 is not in the range" in err
    assert "read or written twice" in cli("finetune", trio[0], *rest, "-o", trio[0])[2]
    assert "read or written twice" in cli("distil", trio[0], "--parents", trio[1], *rest, "-o", trio[1])[2]
    assert "no such file" in cli("distil", trio[0], "--parents", "x.pt", *rest, "-o", "out.pt")[2]
    assert cli("distil", trio[0], *PARENTS, *rest, "-o", "out.pt", "--temperature", 0)[0] == 2
    assert sorted(path.name for path in Path().iterdir()) == ["a.safetensors", "b.safetensors", "c.safetensors"]
