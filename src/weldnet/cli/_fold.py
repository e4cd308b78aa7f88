"""``weldnet fold``: one network into a narrower one of its architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weldnet.cli._common import (
    DATA_METAVAR,
    INPUT_HELP,
    MODEL_HELP,
    NETWORKS_HELP,
    Device,
    Json,
    Outputs,
    Seed,
    Written,
    emit,
    parse_outputs,
    print_json,
    stray_prints_to_stderr,
)

__all__ = ["fold"]


def fold(
    network: Annotated[Path, typer.Argument(metavar="WIDE", help=NETWORKS_HELP, show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="The narrower network.")],
    model: Annotated[str, typer.Option("--model", metavar="SPEC", help=f"The wide network. {MODEL_HELP}")],
    into: Annotated[str, typer.Option("--into", metavar="SPEC", help="The narrow network, as --model.")],
    example_input: Annotated[str, typer.Option("--input", metavar="SPEC", help=INPUT_HELP)],
    outputs: Outputs = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar=DATA_METAVAR, help="Optional: the test split of this scores both networks."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Prove the structure on the wide network first.")
    ] = True,
    seed: Seed = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """Fold a network into a narrower one of the same architecture, without training data.

    Units that do alike become one; units that are copies of one another do so without any change of the function.
    """
    from weldnet.cli._early import WRITTEN_SUFFIXES, check_data, refuse_overwriting, refuse_suffix, require_files
    from weldnet.cli._specs import check_specs

    require_files([network])
    check_specs(model, example_input)
    check_specs(into, option="--into")
    refuse_suffix(output, WRITTEN_SUFFIXES)
    refuse_overwriting([output], [network])
    if data is not None:
        check_data(data)
    from weldnet.checkpoints import check_writable, provenance, save
    from weldnet.cli._data import load_labelled
    from weldnet.cli._input import make_input
    from weldnet.cli._method import check_device
    from weldnet.cli._model import build_model
    from weldnet.cli._networks import gather_networks
    from weldnet.evaluation import evaluate
    from weldnet.fusion import fold as fold_network

    check_writable(output)
    check_device(device)
    written = Written.soon(output)
    ((name, wide),) = gather_networks(model, [network]).items()
    narrow = build_model(into)
    labelled = None if data is None else load_labelled(data, "test")
    with stray_prints_to_stderr():
        x = make_input(example_input, wide, seed=seed)
        folded = fold_network(wide, narrow, x, outputs=parse_outputs(outputs), check=check, seed=seed, device=device)
    config = {"made_by": "fold", "model": model, "into": into, "input": example_input, "check": check}
    save(dict(folded.state_dict()), output, metadata=provenance([network], config, seed))
    found = {
        label: {
            "parameters": sum(p.numel() for p in each.parameters()),
            **({} if labelled is None else dict(evaluate(each, labelled, device=device).scores)),
        }
        for label, each in ((name, wide), ("folded", folded))
    }
    if json:
        print_json({**found, "output": output})
    else:
        for label, numbers in found.items():
            emit(f"{label}  {', '.join(_said(key, value) for key, value in numbers.items())}")
    written.say()


def _said(key: str, value: float) -> str:
    if key == "accuracy":
        return f"{key} {value:.2%}"
    return f"{key} {value:,}" if isinstance(value, int) else f"{key} {value:.4f}"
