from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)

_declared: list[torch.library.Library] = []  # torch forgets the operators of a library that nobody holds


@pytest.fixture(scope="session")
def transformers() -> Any:
    """The transformers library; a torchvision without its compiled operators must not keep it from importing."""
    pytest.importorskip("transformers")
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[module]
    import transformers

    return transformers


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
