"""Many networks from disk to disk: processor time and peak memory of ``weldnet.fuse_files`` against their number.

Writes networks of random weights (a seed each) as safetensors, and fuses the first 4, 16, ... of them, each time in a
process of its own, whose peak is its resident memory with PyTorch and all. Sweeps are bounded, so that all numbers of
networks make as many of them: read the ratios. Appends one JSON line a case.

    python benchmarks/many_networks.py /big/networks                              # 4, 16 and 32 ResNet18
    python benchmarks/many_networks.py /big/networks --network vgg11 --counts 2 8 --method gamf
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import weldnet
from weldnet import models
from weldnet.alignment import Gamf, WeightMatching

sys.path.append(str(Path(__file__).resolve().parents[1] / "studies"))

from records import provenance


def measure(folder: Path, network: str, count: int, method: str, sweeps: int) -> dict[str, Any]:
    """Fuse the first networks of a folder in this process."""
    files = [folder / f"{network}-{seed}.safetensors" for seed in range(count)]
    # One sweep a temperature, and as many at the end, whatever the number of networks.
    chosen = WeightMatching(sweeps=sweeps) if method == "weight_matching" else Gamf(sweeps=1, hard_sweeps=sweeps)
    out = folder / f"fused-{count}"
    shutil.rmtree(out, ignore_errors=True)
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    start, cpu = time.perf_counter(), time.process_time()
    result = weldnet.fuse_files(files, x, model=lambda: models.build(network), out=out, method=chosen, progress=False)
    seconds = {"wall_seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    shutil.rmtree(out)
    return {
        "network": network,
        "networks": count,
        "method": repr(chosen),
        **{name: round(value, 1) for name, value in seconds.items()},
        "align_seconds": round(result.report.seconds["align"], 1),
        "peak_gb": round(peak / 1e9, 3),
        "one_network_gb": round(sum(file.stat().st_size for file in files) / count / 1e9, 4),
        "sweeps": result.alignment.stats["sweeps"],
        "objective": result.alignment.stats["objective"],
        "check": result.report.check,
        "threads": torch.get_num_threads(),
    }


def write_networks(folder: Path, network: str, count: int) -> None:
    """Write the networks that are not there yet."""
    for seed in range(count):
        file = folder / f"{network}-{seed}.safetensors"
        if not file.exists():
            torch.manual_seed(seed)
            weldnet.checkpoints.save(models.build(network).state_dict(), file)


def main() -> None:
    """Write networks and measure, each number of them in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the networks; 45 MB for each ResNet18")
    parser.add_argument("--out", type=Path, default=Path("docs/results/many-networks.jsonl"))
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 16, 32])
    parser.add_argument("--method", choices=("weight_matching", "gamf"), default="weight_matching")
    parser.add_argument("--sweeps", type=int, default=3, help="hard sweeps at most")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if args.case:
        print(json.dumps(measure(args.folder, args.network, args.case, args.method, args.sweeps)))
        return
    write_networks(args.folder, args.network, max(args.counts))
    origin = provenance()
    for count in args.counts:
        command = [sys.executable, __file__, *sys.argv[1:], "--case", str(count)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        print(done, flush=True)
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**json.loads(done), **origin}) + "\n")


if __name__ == "__main__":
    main()
