"""``weldnet check``: the permutation test on real weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from weldnet.cli._common import (
    Checkpoints,
    FolderInput,
    FolderModel,
    Json,
    Outputs,
    Route,
    Seed,
    emit,
    parse_outputs,
    print_json,
    stray_prints_to_stderr,
)

__all__ = ["check"]


def check(
    checkpoints: Checkpoints,
    model: FolderModel = None,
    example_input: FolderInput = None,
    outputs: Outputs = None,
    route: Route = "auto",
    measure_power: Annotated[
        bool, typer.Option("--power/--no-power", help="Also show what the proof would notice: a pass for each tensor.")
    ] = True,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Prove that renumbering the units of each network leaves its output unchanged (in float64).

    The power of a tensor is how much the output changes if it alone is forgotten, on random weights that keep all units
    alive; the same for networks of one architecture.

    Checkpoints may be .safetensors, .pt, .pth, .bin, .ckpt, an .index.json, or a folder with one of them.
    """
    from weldnet.cli._early import check_route, require_files, require_model
    from weldnet.cli._specs import check_specs

    check_route(route)
    require_files(checkpoints)
    require_model(model, example_input, checkpoints, "check")
    check_specs(model, example_input)
    from weldnet.cli._input import make_input
    from weldnet.cli._networks import gather_networks
    from weldnet.structure import capture, power
    from weldnet.structure import check as run_check

    networks = gather_networks(model, checkpoints)
    first = next(iter(networks.values()))
    with stray_prints_to_stderr():
        x = make_input(example_input, first, seed=seed)
        structure = capture(first, x, parse_outputs(outputs), route=route)
        results = {
            name: run_check(
                network, make_input(example_input, network, seed=seed) if example_input else x, structure, seed=seed
            )
            for name, network in networks.items()
        }
        found = power(first, x, structure, seed=seed) if measure_power and structure.spaces else None
    if json:
        measured = {} if found is None else {"power": found.to_dict()}
        print_json(
            {
                name: {"passed": True, "spaces": len(structure.spaces), **asdict(result), **measured}
                for name, result in results.items()
            }
        )
        return
    evidence, *more = str(found).splitlines() if found is not None else [""]
    for name, result in results.items():
        emit(f"{name}  {result}" + (f"; {evidence}" if evidence else ""))
    for line in more:
        emit(line)
