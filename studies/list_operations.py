"""List the ATen operations that the reference list (``zoo.py``) runs, for the test that each of them has a rule.

python studies/list_operations.py > tests/reference_operations.txt
"""

from __future__ import annotations

import logging
import warnings

import torch
from zoo import ZOO

from weldnet.structure._trace import trace


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found: set[str] = set()
    for entry in ZOO.values():
        found |= {str(op.func) for op in trace(entry.build(), entry.example()).operations}
    print(*sorted(found), sep="\n")


if __name__ == "__main__":
    main()
