"""Seconds and peak memory of aligning full-size pairs; one process a case, so that peaks do not mix.

python benchmarks/full_size.py                 # every case
python benchmarks/full_size.py vgg11 inf       # one
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time

import torch

import weldnet
from weldnet import models
from weldnet.alignment import Gamf, Problem

CASES = [("vgg11", "inf"), ("vgg11", "4"), ("resnet18", "inf"), ("resnet50", "inf")]
OPTIONS = {"vgg11": {"bias": False}}


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def measure(name: str, sigma: str) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    pair = [models.build(name, **OPTIONS.get(name, {})) for _ in range(2)]
    start = time.perf_counter()
    structure = weldnet.capture(pair[0], torch.zeros(1, 3, 32, 32))
    captured = time.perf_counter() - start
    before = peak_gb()
    start, cpu = time.perf_counter(), time.process_time()
    alignment = Gamf(sigma=float(sigma))(Problem(structure, {"a": pair[0].state_dict(), "b": pair[1].state_dict()}))
    print(
        f"{name} sigma={sigma}: {sum(p.numel() for p in pair[0].parameters()):,} parameters, capture {captured:.1f} s, "
        f"align {time.perf_counter() - start:.1f} s wall, {time.process_time() - cpu:.1f} s CPU, "
        f"{peak_gb() - before:.2f} GB above the models, {dict(alignment.stats)}",
        flush=True,
    )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(sys.argv[1], sys.argv[2])
    else:
        for case in CASES:
            subprocess.run([sys.executable, __file__, *case], check=True)
