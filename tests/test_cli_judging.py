"""Commands that judge networks: evaluate, barrier, plane, spaces, compare, finetune and distil."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from weldnet import checkpoints
from weldnet.alignment import AUTO
from weldnet.cli import main
from weldnet.cli._model import build_model

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
    assert f"{AUTO[False].method} (auto: " in out
    (row,) = json.loads(cli(*arguments, "--json")[1])["diagnosis"]
    assert row["units"] == 12
    assert row["quality"] > row["unaligned"]


# -- compare -----------------------------------------------------------------------------------------


def test_compare_shows_every_combination(cli, trio):
    arguments = ("compare", *trio[:2], *BASE, "--data", "digits", "--methods", "identity,weight_matching")
    code, out, err = cli(*arguments, "--repairs", "auto,data", "--points", 3)
    assert code == 0, err
    assert "parent a" in out
    assert "ensemble" in out
    assert "failed     identity with data: MLP has no BatchNorm statistics" in out
    document = json.loads(cli(*arguments, "--points", 3, "--json", "--sort", "method")[1])
    assert [row["method"] for row in document["rows"]] == ["identity", "weight_matching"]
    assert [row["role"] for row in document["references"]] == ["parent", "parent", "ensemble"]
    assert all(row["barrier"] >= 0 and row["seconds"] > 0 and row["error"] is None for row in document["rows"])
    fused = json.loads(
        cli("fuse", *trio[:2], "-o", "f.pt", *BASE, "--data", "digits", "--json", "--method", "identity")[1]
    )
    assert document["rows"][0]["scores"] == fused["rows"][-1]["scores"]


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


def test_compare_fails_if_no_combination_works(cli, trio):
    code, out, err = cli(
        "compare", *trio[:2], *BASE, "--data", "digits", "--methods", "identity", "--repairs", "data", "--points", 0
    )
    assert code == 1
    assert "failed     identity with data" in out
    assert err.splitlines()[-1] == "weldnet: error: no combination worked; the rows say why"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "gmf"], "did you mean 'gamf'"),
        (["--repairs", "nothing"], "--repairs: unknown name 'nothing'"),
        (["--methods", ","], "names nothing"),
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
