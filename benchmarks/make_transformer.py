"""Write a pair of Llama-like networks with random weights, shard by shard, without ever holding one of them.

The second is the first with every space of units renumbered at random, plus noise: a good alignment finds the numbering
again, and what it must find is written beside the networks.

python benchmarks/make_transformer.py /big/pair                                # 1.05 B parameters, 4.2 GB each
python benchmarks/make_transformer.py /big/small --layers 4 --hidden 512 --intermediate 1408 --heads 8
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import weldnet
from weldnet.alignment import Alignment
from weldnet.assignment import Permutation
from weldnet.checkpoints import Entry, parse_size, plan_shards, shard_names, write_index, write_shard
from weldnet.structure import build_weightless, random_renumbering, renumber

sys.path.append(str(Path(__file__).resolve().parents[1] / "studies"))

from zoo import declare_torchvision


def main() -> None:
    args = _arguments()
    declare_torchvision()  # transformers imports it, and its compiled operators may not fit torch's CPU wheels
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        vocab_size=args.vocab,
        tie_word_embeddings=False,
        dtype=args.dtype,
        architectures=["LlamaForCausalLM"],
    )
    dtype = getattr(torch, args.dtype)
    model = build_weightless(lambda: AutoModelForCausalLM.from_config(config))
    structure = weldnet.capture(model, {"input_ids": torch.arange(8)[None]})
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(structure.spaces)} spaces", flush=True)
    planted = random_renumbering(structure, torch.Generator().manual_seed(args.seed))
    entries = {name: (dtype, tuple(t.shape)) for name, t in model.state_dict().items()}

    def first(name: str) -> Tensor:
        return _draw(name, entries[name][1], args.seed).to(dtype)

    def second(name: str) -> Tensor:
        tensor = renumber({name: _draw(name, entries[name][1], args.seed)}, structure, planted)[name]
        return torch.lerp(tensor, _draw(name, entries[name][1], args.seed + 1), args.noise).to(dtype)

    for folder, read in (("a", first), ("b", second)):
        _write(args.folder / folder, config, entries, read, parse_size(args.shard_size))
    inverse = {space: Permutation(source).inverse() for space, source in planted.items()}
    stay = {space.name: Permutation.identity(space.size) for space in structure.spaces}
    Alignment({"a": stay, "b": inverse}, "planted").save(args.folder / "planted.safetensors")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="gets the folders a and b, and planted.safetensors")
    for name, value in (("layers", 24), ("hidden", 1792), ("intermediate", 4864), ("heads", 14), ("vocab", 32000)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--noise", type=float, default=0.3, help="share of other random weights in b, 0 to 1")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shard-size", default="1GB")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    values = torch.randn(shape, generator=generator)
    return values.mul_(0.1).add_(1) if len(shape) == 1 else values.mul_(0.02)


def _write(folder: Path, config: Any, entries: dict[str, Entry], read: Callable[[str], Tensor], limit: int) -> None:
    config.save_pretrained(folder)
    shards = plan_shards(entries, limit)
    for file, names in zip(shard_names(len(shards)), shards, strict=True):
        write_shard(folder / file, {name: entries[name] for name in names}, read, {"format": "pt"})
        print(f"wrote {folder / file}", flush=True)
    if len(shards) > 1:
        write_index(folder, shards, entries)


if __name__ == "__main__":
    main()
