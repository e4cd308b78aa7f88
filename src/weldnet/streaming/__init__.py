"""Streaming: fuse networks that are larger than memory, from disk to disk."""

from weldnet.streaming._fuse import fuse_files
from weldnet.streaming._streamed import Streamed

__all__ = ["Streamed", "fuse_files"]
