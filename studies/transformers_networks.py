"""The transformers that ``transformers_pairs.py`` fuses: how they are built, trained, cached and scored.

timm and transformers are needed here. A seed decides the initial weights and the order of the data.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import math
import os
import sysconfig
import time
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from zoo import declare_torchvision

from weldnet import data, evaluation
from weldnet.training import Recipe, initialise, train

__all__ = ["TASKS", "Task", "network"]

_log = logging.getLogger("transformers_pairs")

Part = Literal["validation", "test"]


class Task(Protocol):
    """Networks that differ only in their seed, and the data that they are trained and scored on."""

    name: str
    classes: int

    def build(self) -> nn.Module:
        """Make the network with random weights."""
        ...

    def example(self) -> Tensor:
        """Make the input that the structure is captured with."""
        ...

    def train(self, model: nn.Module, seed: int, state: Path) -> tuple[nn.Module, dict[str, Any]]:
        """Train it; return it and what to write down about it."""
        ...

    def score(self, model: nn.Module, part: Part, limit: int | None = None) -> evaluation.Metrics:
        """Measure loss and accuracy on held-out data, on at most `limit` images or windows of text."""
        ...

    def guess(self, part: Part) -> float:
        """Return the loss of a guess from how often each answer occurs in the training data."""
        ...


def network(task: Task, seed: int, nets: Path) -> nn.Module:
    """Load a trained network, or train it and keep it."""
    path = nets / task.name / f"seed{seed}.safetensors"
    model = initialise(task.build, seed)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        start = time.process_time()
        model, record = task.train(model, seed, path.with_suffix(".state"))
        found = task.score(model, "validation")
        record |= {
            "set": task.name,
            "seed": seed,
            "validation_loss": found.loss,
            "validation_accuracy": found.accuracy,
            "cpu_seconds": round(time.process_time() - start, 1),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        _write(model, record, path)
        _log.info("%s: validation accuracy %.4f, loss %.4f", path, found.accuracy, found.loss)
    stored = load_file(path)
    model.load_state_dict({key: stored[name] for key, name in _homes(model).items()})
    return model.eval()


def _homes(model: nn.Module) -> dict[str, str]:
    """For every key, the first key of the same tensor: tied tensors are stored once."""
    first: dict[int, str] = {}
    return {key: first.setdefault(tensor.data_ptr(), key) for key, tensor in model.state_dict().items()}


def _write(model: nn.Module, record: dict[str, Any], path: Path) -> None:
    state = model.state_dict()
    scratch = path.with_suffix(".tmp")
    save_file({name: state[name].contiguous() for name in set(_homes(model).values())}, scratch)
    path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    os.replace(scratch, path)
    path.with_suffix(".state").unlink(missing_ok=True)


# -- a vision transformer on CIFAR-10 ----------------------------------------------------------------


@dataclass(frozen=True)
class Vision:
    """timm's ViT-Ti (192 wide, 12 layers, 3 heads) on 32 x 32 images in patches of 8."""

    name: str = "cifar10-vit-tiny"
    classes: int = 10
    held_out: int = 5000
    patch_dropout: float = 0.5  # in training only: nearly halves the time
    recipe: Recipe = field(
        default=Recipe(epochs=2, batch_size=128, lr=1e-3, weight_decay=0.05, schedule="onecycle", precision="bfloat16")
    )

    def build(self) -> nn.Module:
        declare_torchvision()
        import timm
        from timm.layers import set_fused_attn

        set_fused_attn(False)  # the fused kernel is slower on 17 tokens
        sizes = {"img_size": 32, "patch_size": 8, "num_classes": self.classes}
        return timm.create_model("vit_tiny_patch16_224", patch_drop_rate=self.patch_dropout, **sizes)

    def example(self) -> Tensor:
        return _images("test").images[:1]

    def train(self, model: nn.Module, seed: int, state: Path) -> tuple[nn.Module, dict[str, Any]]:
        recipe = replace(self.recipe, seed=seed)
        whole = _images("train")
        kept = data.Split(whole.images[: -self.held_out], whole.labels[: -self.held_out], whole.classes, whole.name)
        result = train(model, kept, recipe, state_path=state, resume=True, progress=False)
        record = {"recipe": asdict(recipe) | {"patch_dropout": self.patch_dropout}}
        return result.model, record | {"seconds": round(result.seconds, 1)}

    def score(self, model: nn.Module, part: Part, limit: int | None = None) -> evaluation.Metrics:
        whole = _images("test" if part == "test" else "train")
        images, labels = whole.images, whole.labels
        if part == "validation":
            images, labels = images[-self.held_out :], labels[-self.held_out :]
        split = data.Split(images[:limit], labels[:limit], whole.classes, whole.name)
        return evaluation.evaluate(model, split)

    def guess(self, part: Part) -> float:
        return math.log(self.classes)  # CIFAR-10 has as many images of each class


@cache
def _images(split: Literal["train", "test"]) -> data.Split:
    return data.load("cifar10", split=split)


# -- a small GPT-2 on Python's own sources -----------------------------------------------------------


class NextByte(nn.Module):
    """GPT-2 that takes bytes (batch, length) and gives logits (batch, length, 256), without a cache."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor) -> Tensor:
        return self.network(input_ids=ids, use_cache=False).logits


@dataclass(frozen=True)
class Text:
    """GPT-2 (128 wide, 4 layers, 4 heads, 128 positions) on the bytes of the Python standard library's modules."""

    name: str = "python-gpt2"
    classes: int = 256
    length: int = 128
    batch_size: int = 16
    steps: int = 800
    lr: float = 2e-3
    weight_decay: float = 0.01
    windows: int = 512

    def build(self) -> nn.Module:
        declare_torchvision()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=self.classes,
            n_embd=128,
            n_layer=4,
            n_head=4,
            n_positions=self.length,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="eager",
        )
        return NextByte(GPT2LMHeadModel(config))

    def example(self) -> Tensor:
        return self._windows("test", 1)[0]

    def train(self, model: nn.Module, seed: int, state: Path) -> tuple[nn.Module, dict[str, Any]]:
        text = _bytes("train")
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=self.steps, pct_start=0.1)
        start, loss = time.perf_counter(), torch.zeros(())
        model.train()
        for step in range(self.steps):
            first = torch.randint(len(text) - self.length, (self.batch_size,), generator=generator)
            window = text[first[:, None] + torch.arange(self.length + 1)].long()
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(window[:, :-1])
            loss = functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 100 == 99:
                _log.info("step %d of %d: loss %.3f", step + 1, self.steps, loss.item())
        recipe = {k: getattr(self, k) for k in ("steps", "batch_size", "length", "lr", "weight_decay")}
        corpus = {part: [len(_bytes(part)), _fingerprint(part)] for part in ("train", "validation", "test")}
        return model.eval(), {"recipe": recipe, "corpus": corpus, "seconds": round(time.perf_counter() - start, 1)}

    def score(self, model: nn.Module, part: Part, limit: int | None = None) -> evaluation.Metrics:
        inputs, targets = self._windows(part, min(limit or self.windows, self.windows))
        loss = correct = 0.0
        with evaluation.evaluation_mode(model):
            for ids, answers in zip(inputs.split(64), targets.split(64), strict=True):
                logits = model(ids).flatten(0, 1)
                loss += functional.cross_entropy(logits, answers.flatten(), reduction="sum").item()
                correct += float((logits.argmax(1) == answers.flatten()).sum())
        return evaluation.Metrics(
            accuracy=correct / targets.numel(), loss=loss / targets.numel(), samples=targets.numel()
        )

    def guess(self, part: Part) -> float:
        seen = torch.bincount(_bytes("train").long(), minlength=self.classes) + 1.0
        answers = self._windows(part, self.windows)[1]
        return -(seen / seen.sum()).log()[answers].mean().item()

    def _windows(self, part: Part, count: int) -> tuple[Tensor, Tensor]:
        """Take windows at even distances: inputs and the bytes that follow them."""
        text = _bytes(part)
        first = torch.arange(count) * (len(text) - self.length - 1) // count
        window = text[first[:, None] + torch.arange(self.length + 1)].long()
        return window[:, :-1], window[:, 1:]


@cache
def _bytes(part: str) -> Tensor:
    """Return the bytes of one part: whole files, shared out by a hash of their names, a tenth each held out."""
    parts = {0: "validation", 1: "test"}
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    chosen = [f for f in files if parts.get(hashlib.sha256(f.name.encode()).digest()[0] % 10, "train") == part]
    return torch.frombuffer(bytearray(b"\n".join(f.read_bytes() for f in chosen)), dtype=torch.uint8)


def _fingerprint(part: str) -> str:
    return hashlib.sha256(_bytes(part).numpy().tobytes()).hexdigest()[:16]


TASKS: dict[str, Task] = {task.name: task for task in (Vision(), Text())}
