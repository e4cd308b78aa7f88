"""Settings of sinkhorn_rebasin beside weight_matching and gamf, on validation pairs.

Accuracy without repair on 1,512 training images; methods that learn by outputs get 512 other ones, unlabelled. Networks
come from ``studies/train_networks.py``. Appends one JSON line for each alignment and skips what is there.

    python studies/sinkhorn_study.py --out docs/results/sinkhorn.jsonl
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from records import provenance
from torch.utils.data import TensorDataset
from train_networks import SETS

import weldnet
from weldnet import checkpoints, data, evaluation, models
from weldnet.alignment import Gamf, SinkhornRebasin, WeightMatching

PAIRS = ("mnist-mlp-val", "cifar10-vgg11q-val")
METHODS = {
    "weight_matching": WeightMatching(),
    "gamf": Gamf(),
    "distance": SinkhornRebasin(),
    "distance, raw weights": SinkhornRebasin(weighting="raw"),
    "distance, 300 steps": SinkhornRebasin(steps=300),
    "distance, 300 steps, rate 0.03": SinkhornRebasin(steps=300, rate=0.03),
    "product": SinkhornRebasin(loss="product"),
    "midpoint": SinkhornRebasin(loss="midpoint"),
    "random": SinkhornRebasin(loss="random"),
}


def run(nets: Path, out: Path) -> None:
    """Align everything that is not in the records yet."""
    lines = out.read_text().splitlines() if out.exists() else []
    done = {(r["set"], r["method"]) for r in map(json.loads, lines)}
    for name in PAIRS:
        choice = SETS[name]
        train = data.load(choice.dataset, split="train", limit=2024)
        unlabelled = train.images[:512]
        rest = TensorDataset(train.images[512:], train.labels[512:])
        networks = {}
        for seed in (100, 101):
            networks[str(seed)] = models.build(choice.model, **choice.options).eval()
            state = checkpoints.load(nets / name / f"seed{seed}.safetensors")
            checkpoints.load_into(networks[str(seed)], state, str(seed))
        structure = weldnet.capture(networks["100"], unlabelled[:1])
        for label, method in METHODS.items():
            if (name, label) in done:
                continue
            start = time.process_time()
            given = unlabelled if method.needs_data else None
            alignment = weldnet.align(networks, structure, method=method, data=given)
            seconds = time.process_time() - start
            states = [weldnet.transport(m.state_dict(), structure, alignment[n]) for n, m in networks.items()]
            model = models.build(choice.model, **choice.options).eval()
            checkpoints.load_into(model, weldnet.average(states), "average")
            record = {
                "set": name,
                "method": label,
                "setting": repr(method),
                "accuracy": evaluation.evaluate(model, rest).accuracy,
                "parents": [evaluation.evaluate(m, rest).accuracy for m in networks.values()],
                "cpu_seconds": round(seconds, 2),
                "objective": alignment.stats["objective"],
                **provenance(),
            }
            with out.open("a") as file:
                file.write(json.dumps(record) + "\n")


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", type=Path, default=Path("runs/nets"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    run(args.nets, args.out)


if __name__ == "__main__":
    main()
