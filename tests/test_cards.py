"""Folders that ``fuse`` writes: weights, config and card, and the page of one fusion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import weldnet
from weldnet import checkpoints
from weldnet.cli import main
from weldnet.records import Records
from weldnet.report import build, fusion_records

MODEL = "mlp?sizes=64,12,10"
BASE = ["--model", MODEL, "--input", "1,1,8,8"]


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from weldnet.cli._model import build_model

    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        checkpoints.save(build_model(MODEL, seed=seed).state_dict(), f"{name}.safetensors")
    return ["a.safetensors", "b.safetensors"]


def test_a_folder_holds_weights_config_and_card(pair: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["fuse", *pair, "-o", "out/fused", *BASE, "--data", "digits", "--repair", "none"]) == 0
    folder = Path("out/fused")
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.yaml", "README.md"}
    card = (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "weldnet"
    for name in pair:
        assert f"| `{name}` | `{checkpoints.file_sha256(name)}` | 0.5 |" in card
    score = json.loads(checkpoints.read_metadata(folder)["config"])
    assert score["repair"] == "none"
    for text in (
        "| method | gamf |",
        "| repair | none |",
        "1 space, ",
        "equivalence error",
        "## Licence",
        f"the network that {MODEL} builds",
    ):
        assert text in card
    capsys.readouterr()
    assert main(["evaluate", str(folder), "--model", MODEL, "--data", "digits", "--json"]) == 0
    accuracy = json.loads(capsys.readouterr().out)["networks"][0]["accuracy"]
    assert f"| `fused` | fused | {accuracy:.2%} |" in card

    # The config makes the same network again; so does the Python of the card.
    assert main(["fuse", "--config", str(folder / "config.yaml"), "-o", "again.safetensors"]) == 0
    again, first = weldnet.load("again.safetensors"), weldnet.load(folder / "model.safetensors")
    assert all(torch.equal(again[key], first[key]) for key in first)
    code = card.split("```python\n")[1].split("```")[0].replace('"model.', f'"{folder}/model.')
    from weldnet.cli._model import build_model

    scope = {"model": build_model(MODEL, seed=5)}
    exec(code, scope)
    assert all(torch.equal(value, first[key]) for key, value in scope["model"].state_dict().items())


def test_an_existing_folder_is_written_into_but_not_over_the_files_of_others(
    pair: list[str], capsys: pytest.CaptureFixture[str]
):
    Path("there.v1").mkdir()
    Path("there.v1/notes.txt").write_text("mine")
    arguments = ["fuse", *pair, "-o", "there.v1", *BASE, "--method", "identity"]
    for end in ("wrote there.v1", "wrote there.v1, in place of what was there"):  # the second over its own
        assert main(arguments) == 0
        assert capsys.readouterr().err.splitlines()[-1] == f"weldnet: {end}"
    assert Path("there.v1/notes.txt").read_text() == "mine"
    assert len(list(Path("there.v1").iterdir())) == 4
    Path("other").mkdir()
    Path("other/README.md").write_text("# Mine\n")
    capsys.readouterr()
    assert main(["fuse", *pair, "-o", "other", *BASE]) == 2
    assert "'other/README.md' is there already and not of weldnet's making" in capsys.readouterr().err
    assert [path.name for path in Path("other").iterdir()] == ["README.md"]


@pytest.mark.parametrize("shard", ["1KB", "2GB"])  # several shards, and one
def test_a_folder_of_shards_is_not_written_into(pair: list[str], shard: str, capsys: pytest.CaptureFixture[str]):
    arguments = ["fuse", *pair, "-o", "shards", *BASE, "--method", "identity"]
    assert main([*arguments, "--stream", "--shard-size", shard]) == 0
    before = {path: path.read_bytes() for path in Path("shards").iterdir()}
    capsys.readouterr()
    assert main(arguments) == 2
    assert "belongs to a network in shards" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("shards").iterdir()} == before


def test_a_failed_fusion_leaves_no_folder(
    pair: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("weldnet.fusion._fusion.save", fail)
    before = sorted(Path().iterdir())
    assert main(["fuse", *pair, "-o", "fused", *BASE, "--report", "r.md"]) == 1
    assert sorted(Path().iterdir()) == before


def test_the_page_of_a_fusion(pair: list[str]):
    assert main(["fuse", *pair, "-o", "f.pt", *BASE, "--data", "digits", "--samples", "64", "--report", "r.html"]) == 0
    html = Path("r.html").read_text()
    for name in ("glance", "measurements", "barriers", "variances", "spaces", "couplings", "protocol", "provenance"):
        assert f'<section id="{name}"' in html
    assert len(html) < 6_000_000


def test_the_records_of_a_fusion_are_its_report():
    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    x = torch.randn(64, 4)
    labels = torch.randint(0, 3, (64,))
    parents = {"a": network(0), "b": network(1), "c": network(2)}
    fusion = weldnet.fuse(parents, x[:1], evaluate_on=(x, labels), progress=False)
    records = Records(
        tuple(fusion_records(fusion, parents=parents, evaluate_on=(x, labels), command="weldnet fuse a b c"))
    )
    fused = fusion.report.row("fused")
    assert fused is not None
    (found,) = records.of("result", network=fused.name)
    assert found.values["accuracy"] == fused.scores["accuracy"]
    assert [record.cell["network"] for record in records.of("couplings")] == ["b", "c"]
    source = records.of("couplings", network="c")[0].extra["spaces"]["0"]
    assert source == fusion.alignment["c"]["0"].tensors["source"].tolist()
    before, after = records.of("curve")
    assert before.extra["y"]["loss"][0] == after.extra["y"]["loss"][0]
    assert after.extra["y"]["loss"][-1] == pytest.approx(before.extra["y"]["loss"][-1], rel=1e-5)  # the same function
    page = build(records)
    assert page.title == "Fusion of a and b and c"
    assert page.provenance["commands"] == ["weldnet fuse a b c"]
    assert [section.name for section in page.sections][:2] == ["glance", "methods"]
