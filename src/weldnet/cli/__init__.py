"""The command line: ``weldnet fuse a.pt b.pt -o fused.safetensors --model ... --input ...``.

Data goes to stdout, messages go to stderr. Exit codes: 0 done, 1 the job failed, 2 wrong usage, 130 interrupted.
Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

from weldnet.cli._app import app, main

__all__ = ["app", "main"]
