"""Partition: which rows of a labelled dataset each of several networks, or clients, is trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weldnet.errors import DataError, UsageError

__all__ = ["SCHEMES", "Scheme", "partition"]

Scheme = Literal["iid", "dirichlet", "skew", "shards"]

Rows = NDArray[np.int64]

_DRAWS = 1000


def partition(
    labels: Tensor,
    parts: int,
    scheme: Scheme = "iid",
    *,
    alpha: float = 0.5,
    share: float = 0.8,
    shards: int = 2,
    smallest: int = 10,
    seed: int = 0,
) -> list[Tensor]:
    """Split the rows of a dataset among several networks: every row goes to one of them.

    - ``iid``: shuffled, equal parts.
    - ``dirichlet``: for each class the parts' shares are drawn from Dirichlet(alpha); parts that already have their
      fair number of rows get no more; drawn again until every part has ``smallest`` rows.
    - ``skew``: class c belongs to part ``c % parts``, which gets ``share`` of its rows; the others share the rest.
    - ``shards``: rows sorted by label are cut into ``parts * shards`` pieces, and each part gets ``shards`` of them.

    Args:
        labels: integers, shape (rows,).
        parts: how many networks, 1 or more.
        scheme: one of :data:`SCHEMES`.
        alpha: of ``dirichlet``; small is uneven.
        share: of ``skew``, 0..1.
        shards: of ``shards``, for each part.
        smallest: of ``dirichlet``, rows that every part has at least.
        seed: of the draw.

    Returns:
        For each part its row numbers, sorted; none is empty.

    Raises:
        UsageError: an option that means nothing.
        DataError: too few rows for that many parts.

    Source: Yurochkin et al., https://arxiv.org/abs/1905.12022 (Dirichlet); Li et al., https://arxiv.org/abs/2102.02079
    (balanced draw); McMahan et al., https://arxiv.org/abs/1602.05629 (shards).

    Example:
        >>> import torch
        >>> [len(rows) for rows in partition(torch.arange(10) % 2, 2, "skew")]
        [5, 5]
    """
    if scheme not in SCHEMES:
        raise UsageError(f"unknown partition {scheme!r}; choose {', '.join(SCHEMES)}")
    limits = {
        "parts": (parts, parts >= 1, "1 or more"),
        "alpha": (alpha, 0 < alpha < math.inf, "a number above 0"),
        "share": (share, 0 <= share <= 1, "0..1"),
        "shards": (shards, shards >= 1, "1 or more"),
    }
    for name, (value, fine, allowed) in limits.items():
        if not fine:
            raise UsageError(f"partition {scheme}: {name} is {value!r}; give {allowed}")
    numbers = labels.numpy()
    if len(numbers) < parts:
        raise DataError(f"{len(numbers)} rows cannot be split among {parts} networks; give more rows or fewer networks")
    random = np.random.default_rng(seed)
    draws: dict[str, Callable[[], Sequence[Rows]]] = {
        "iid": lambda: np.array_split(random.permutation(len(numbers)), parts),
        "dirichlet": lambda: _dirichlet(numbers, parts, alpha, smallest, random),
        "skew": lambda: _skew(numbers, parts, share, random),
        "shards": lambda: _shards(numbers, parts, shards, random),
    }
    found = draws[scheme]()
    if not all(len(rows) for rows in found):
        raise DataError(
            f"partition {scheme} leaves one of {parts} networks without rows; give fewer networks or another scheme"
        )
    return [torch.from_numpy(np.sort(rows)) for rows in found]


SCHEMES: tuple[str, ...] = ("iid", "dirichlet", "skew", "shards")
"""The ways to split a dataset."""


def _dirichlet(labels: Rows, parts: int, alpha: float, smallest: int, random: np.random.Generator) -> list[Rows]:
    if parts * smallest > len(labels):
        raise DataError(
            f"{len(labels)} rows are fewer than {smallest} for each of {parts} networks; give fewer networks or a "
            "lower smallest"
        )
    fair = len(labels) / parts
    for _ in range(_DRAWS):
        found: list[list[Rows]] = [[] for _ in range(parts)]
        for label in np.unique(labels):
            rows = random.permutation(np.flatnonzero(labels == label))
            shares = random.dirichlet(np.full(parts, alpha))
            shares *= [sum(map(len, mine)) < fair for mine in found]
            if not shares.sum():
                shares = np.ones(parts)
            cuts = (np.cumsum(shares / shares.sum()) * len(rows)).astype(int)[:-1]
            for mine, piece in zip(found, np.split(rows, cuts), strict=True):
                mine.append(piece)
        joined = [np.concatenate(mine) for mine in found]
        if min(map(len, joined)) >= smallest:
            return joined
    raise DataError(
        f"{_DRAWS} Dirichlet({alpha}) draws gave one of {parts} networks fewer than {smallest} of {len(labels)} rows; "
        "raise alpha or give fewer networks"
    )


def _skew(labels: Rows, parts: int, share: float, random: np.random.Generator) -> list[Rows]:
    found: list[list[Rows]] = [[] for _ in range(parts)]
    for number, label in enumerate(np.unique(labels)):
        rows = random.permutation(np.flatnonzero(labels == label))
        owner = number % parts
        cut = len(rows) if parts == 1 else round(share * len(rows))
        found[owner].append(rows[:cut])
        others = [part for part in range(parts) if part != owner]
        for part, piece in zip(others, np.array_split(rows[cut:], max(1, len(others))), strict=False):
            found[part].append(piece)
    return [np.concatenate(mine) if mine else np.empty(0, np.int64) for mine in found]


def _shards(labels: Rows, parts: int, shards: int, random: np.random.Generator) -> list[Rows]:
    order = random.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    pieces = np.array_split(order, parts * shards)
    given = random.permutation(parts * shards).reshape(parts, shards)
    return [np.concatenate([pieces[i] for i in mine]) for mine in given]
