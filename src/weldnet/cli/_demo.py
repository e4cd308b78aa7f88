"""``weldnet demo``: the main job end to end on embedded data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weldnet.cli._common import Json, Seed, Written, emit, interactive, print_json, say

if TYPE_CHECKING:
    from torch import nn

    from weldnet.data import Split

__all__ = ["demo"]

# Chosen on seeds from 100 on; three hidden layers, because with each one the naive average loses more.
MODEL = "mlp?sizes=64,128,64,32,10"
EPOCHS = 15
LR = 5e-3
BATCH_SIZE = 32


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where the files go.")] = Path("demo"),
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Train two small networks on embedded digits, fuse them, and show what came out.

    Writes a.safetensors, b.safetensors, fused.safetensors and report.html (report.md where plotly is not installed).
    """
    from weldnet.checkpoints import check_writable, provenance, save
    from weldnet.cli._outputs import Outputs, write_results
    from weldnet.data import load
    from weldnet.fusion import fuse

    files = {name: output / f"{name}.safetensors" for name in ("a", "b")}
    fused, report = output / "fused.safetensors", output / _report_name()
    for path in (*files.values(), fused, report):
        check_writable(path)
    written = Written.soon(*files.values(), fused, report)
    train, test = load("digits", split="train"), load("digits", split="test")
    seeds = {"a": 2 * seed, "b": 2 * seed + 1}
    say(f"training two networks ({MODEL}) on {len(train)} pictures of digits, from seeds {seeds['a']} and {seeds['b']}")
    parents = {name: _train(train, seeds[name]) for name in files}
    say("fusing them without any data; the scores are on the test pictures")
    result = fuse(parents, test.images[:1], evaluate_on=test, seed=seed, progress=interactive())
    for name, path in files.items():
        config = {"model": MODEL, "data": "digits", "epochs": EPOCHS, "lr": LR, "batch_size": BATCH_SIZE}
        save(parents[name].state_dict(), path, metadata=provenance([], config, seeds[name]))
    parents_of = list(files.values())
    write_results(result, Outputs(weights=fused, files=parents_of, report=report, parents=parents, evaluate_on=test))
    if json:
        print_json({**result.report.to_dict(), "output": fused, "networks": list(files.values()), "report": report})
    else:
        emit(str(result.report))
    written.say()
    again = f"weldnet fuse {files['a']} {files['b']} -o my.safetensors --model '{MODEL}' --input 1,1,8,8 --data digits"
    say(f"next: {again}")


def _report_name() -> str:
    from weldnet.errors import UsageError
    from weldnet.report import require_extra

    try:
        require_extra()
    except UsageError as error:
        say(str(error), kind="note")
        return "report.md"
    return "report.html"


def _train(data: Split, seed: int) -> nn.Module:
    from weldnet.cli._model import build_model
    from weldnet.training import Recipe, train

    recipe = Recipe(epochs=EPOCHS, lr=LR, batch_size=BATCH_SIZE, seed=seed)
    return train(build_model(MODEL, seed=seed), data, recipe, progress=interactive()).model
