from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with the MNIST and CIFAR-10 Parquet folders; a continuous-integration run must have it."""
    checkout = Path(__file__).resolve().parents[1]
    places = [checkout / "shared" / "data", checkout.parent / "shared" / "data"]
    if os.environ.get("WELDNET_DATA"):
        places.insert(0, Path(os.environ["WELDNET_DATA"]))
    for place in places:
        if (place / "mnist").is_dir() and (place / "cifar10").is_dir():
            return place
    reason = f"mnist/ and cifar10/ are in none of {', '.join(map(str, places))}; set WELDNET_DATA"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
