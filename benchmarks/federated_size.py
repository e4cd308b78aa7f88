"""How the aggregation of many large clients grows: seconds and peak memory for several numbers of clients.

    python benchmarks/federated_size.py --clients 10,20,50 --rule gamf

The clients are a VGG11 of 9.2 million parameters with noise on its weights and its units renumbered, in files that are
read one at a time. Seconds are of this process's CPU time; memory is the growth of its resident memory.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from weldnet.checkpoints import save
from weldnet.federated import Blueprint, ClientUpdate, StateFile, aggregate
from weldnet.fusion._memory import watch_memory
from weldnet.models import vgg11
from weldnet.structure import random_renumbering, renumber
from weldnet.training import initialise


def main() -> None:
    """Read the command line; print one line for each number of clients."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", default="10,20,50")
    parser.add_argument("--rule", default="gamf")
    parser.add_argument("--noise", type=float, default=0.5, help="of the weights' standard deviation")
    parser.add_argument("--width", type=float, default=1.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    numbers = [int(number) for number in options.clients.split(",")]
    model = initialise(lambda: vgg11(width=options.width, bias=False), 0)
    blueprint = Blueprint.of(model, torch.zeros(1, 3, 32, 32))
    reference = model.state_dict()
    size = sum(tensor.numel() for tensor in reference.values())
    with tempfile.TemporaryDirectory() as folder:
        updates: list[ClientUpdate] = []
        for number in range(max(numbers)):
            generator = torch.Generator().manual_seed(number)
            noisy = {
                name: t + options.noise * t.std() * torch.randn(t.shape, generator=generator)
                for name, t in reference.items()
            }
            path = Path(folder) / f"{number:03d}.safetensors"
            save(renumber(noisy, blueprint.structure, random_renumbering(blueprint.structure, generator)), path)
            updates.append(ClientUpdate(client=path.stem, state=StateFile(path), examples=100))
        for number in numbers:
            start = time.process_time()
            with watch_memory() as peak:
                found = aggregate(updates[:number], reference, 1, rule=options.rule, blueprint=blueprint)
            seconds = time.process_time() - start
            error = max(float((found.state[name] - t).norm() / t.norm()) for name, t in reference.items())
            print(
                f"{options.rule}: {number} clients of {size / 1e6:.1f} M parameters: {seconds:.1f} CPU s "
                f"({seconds / number:.2f} a client), peak {(peak.bytes or 0) / 1e9:.2f} GB, moved "
                f"{found.stats.get('moved', 0):.1%}, largest relative error of a tensor {error:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
