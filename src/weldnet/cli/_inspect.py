"""``weldnet inspect``: what can be renumbered in a model."""

from __future__ import annotations

from weldnet.cli._common import Checkpoint, InputSpec, Json, ModelSpec, Seed, emit, stray_prints_to_stderr

__all__ = ["inspect"]


def inspect(
    model: ModelSpec, example_input: InputSpec, checkpoint: Checkpoint = None, seed: Seed = 0, json: Json = False
) -> None:
    """Show the structure of a model: spaces, places, what is frozen and why.

    With a checkpoint, its weights are put into the model first, so that one sees whether they fit.
    Checkpoints may be .safetensors, .pt, .pth, .bin, .ckpt, an .index.json, or a folder with one of them.
    """
    from weldnet.cli._early import require_files

    require_files([checkpoint] if checkpoint is not None else [])
    from weldnet.cli._input import make_input
    from weldnet.cli._model import build_model
    from weldnet.cli._networks import load_network, name_files
    from weldnet.structure import capture

    network = build_model(model)
    if checkpoint is not None:
        network = load_network(network, checkpoint, name_files([checkpoint])[0])
    with stray_prints_to_stderr():
        structure = capture(network, make_input(example_input, network, seed=seed))
    emit(structure.to_json() if json else str(structure))
