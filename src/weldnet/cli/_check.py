"""``weldnet check``: the permutation test on real weights."""

from __future__ import annotations

from dataclasses import asdict

from weldnet.cli._common import Checkpoints, InputSpec, Json, ModelSpec, Seed, emit, print_json, stray_prints_to_stderr

__all__ = ["check"]


def check(
    checkpoints: Checkpoints, model: ModelSpec, example_input: InputSpec, seed: Seed = 0, json: Json = False
) -> None:
    """Prove that renumbering the units of each network leaves its output unchanged (in float64).

    Checkpoints may be .safetensors, .pt, .pth, .bin, .ckpt, an .index.json, or a folder with one of them.
    """
    from weldnet.cli._early import require_files

    require_files(checkpoints)
    from weldnet.cli._input import make_input
    from weldnet.cli._model import build_model
    from weldnet.cli._networks import load_networks
    from weldnet.structure import capture
    from weldnet.structure import check as run_check

    networks = load_networks(build_model(model), checkpoints)
    first = next(iter(networks.values()))
    with stray_prints_to_stderr():
        structure = capture(first, make_input(example_input, first, seed=seed))
        results = {
            name: run_check(network, make_input(example_input, network, seed=seed), structure, seed=seed)
            for name, network in networks.items()
        }
    if json:
        print_json({name: {"passed": True, **asdict(result)} for name, result in results.items()})
        return
    for name, result in results.items():
        emit(f"{name}  {result}")
