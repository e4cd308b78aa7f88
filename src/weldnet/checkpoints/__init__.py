"""Checkpoint files: read them safely, compare them, write them whole or not at all.

Every function here raises `weldnet.errors.CheckpointError`, on one line, for whatever is wrong with a file.
No file is ever allowed to run code.
"""

from __future__ import annotations

from weldnet._words import parse_size
from weldnet.checkpoints._match import load_into, match_keys, match_model, match_states, validate_finite
from weldnet.checkpoints._paths import SUFFIXES
from weldnet.checkpoints._prefix import match_prefix, prefix_hint
from weldnet.checkpoints._provenance import provenance, tensors_sha256
from weldnet.checkpoints._read import file_sha256, load, read_metadata
from weldnet.checkpoints._resize import WIDTHS, load_model, read_widths, resized
from weldnet.checkpoints._save import save
from weldnet.checkpoints._shards import Entry, plan_shards, shard_names, write_index, write_shard
from weldnet.checkpoints._stored import StoredState, Where
from weldnet.checkpoints._write import atomic_path, check_writable, remove_temporaries

__all__ = [
    "SUFFIXES",
    "WIDTHS",
    "Entry",
    "StoredState",
    "Where",
    "atomic_path",
    "check_writable",
    "file_sha256",
    "load",
    "load_into",
    "load_model",
    "match_keys",
    "match_model",
    "match_prefix",
    "match_states",
    "parse_size",
    "plan_shards",
    "prefix_hint",
    "provenance",
    "read_metadata",
    "read_widths",
    "remove_temporaries",
    "resized",
    "save",
    "shard_names",
    "tensors_sha256",
    "validate_finite",
    "write_index",
    "write_shard",
]
