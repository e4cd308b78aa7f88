"""The protocol of a fusion study: which networks, how they are trained, split, fused, repaired and tuned."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from weldnet.data import Scheme
from weldnet.training import Recipe

__all__ = ["REFERENCES", "Architecture", "FineTuning", "Partition", "Protocol"]

REFERENCES = ("individual", "best parent", "ensemble")
"""What is scored beside the methods, without fusing."""


def _recipe_keys(values: dict[str, Any]) -> dict[str, Any]:
    known = [entry.name for entry in fields(Recipe) if entry.name != "seed"]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 2)
            hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else f"; the keys are {', '.join(known)}"
            raise ValueError(f"unknown key {key!r}{hint}")
    return values


RecipeKeys = Annotated[dict[str, Any], AfterValidator(_recipe_keys)]
Count = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Architecture(_Strict):
    """A network of ``weldnet.models``; ``others`` are the options of all but the first of a group (other widths)."""

    model: str
    options: dict[str, Any] = {}
    others: dict[str, Any] | None = None
    recipe: RecipeKeys = {}


class Partition(_Strict):
    """How the training rows are split among the networks of a group; without a scheme each sees all of them."""

    scheme: Scheme | None = None
    alpha: float | None = None
    share: float | None = None
    shards: int | None = None
    recipe: RecipeKeys = {}
    networks: dict[int, Count] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What the scheme is given."""
        found = {name: getattr(self, name) for name in ("alpha", "share", "shards")}
        return {name: value for name, value in found.items() if value is not None}

    @model_validator(mode="after")
    def _options_fit(self) -> Partition:
        fitting = {"dirichlet": "alpha", "skew": "share", "shards": "shards"}.get(self.scheme or "")
        for name in self.options:
            if name != fitting:
                raise ValueError(f"{name} has no meaning for scheme {self.scheme!r}; leave it out")
        return self


class FineTuning(_Strict):
    """A short training on all labelled rows after fusing: of which methods with which repairs."""

    recipe: RecipeKeys
    methods: list[str]
    repairs: list[str] = ["none"]


class Line(_Strict):
    """The line from the first network to the others: how many points, and on how many test rows; 0 leaves it out."""

    points: int = 0
    rows: Count | None = None

    @model_validator(mode="after")
    def _is_a_line(self) -> Line:
        if self.points < 0 or self.points == 1:
            raise ValueError(f"{self.points} points make no line; give 2 or more, or 0 to leave it out")
        return self


class Protocol(_Strict):
    """The protocol of a fusion study.

    ``networks`` says how many groups there are of each number of networks; group g of N has the seeds
    ``first_seed + g N`` and on. ``samples`` are unlabelled training rows for methods and repairs. ``rows`` and
    ``test_rows`` cut the data, evenly spaced.
    """

    dataset: str
    rows: Count | None = None
    test_rows: Count | None = None
    architectures: Annotated[dict[str, Architecture], Field(min_length=1)]
    recipe: RecipeKeys
    partitions: Annotated[dict[str, Partition], Field(min_length=1)]
    networks: dict[Annotated[int, Field(ge=2)], Count]
    first_seed: Annotated[int, Field(ge=0)] = 0
    methods: Annotated[list[str], Field(min_length=1)]
    repairs: Annotated[list[str], Field(min_length=1)] = ["none"]
    sizes: Annotated[list[Annotated[float, Field(ge=1)]], Field(min_length=1)] = [1.0]
    samples: Annotated[int, Field(ge=0)] = 0
    fine_tuning: FineTuning | None = None
    barrier: Line = Line()
    couplings: list[str] = []
    device: Literal["cpu", "cuda"] = "cpu"
    threads: Count = 1

    @property
    def datasets(self) -> tuple[str, ...]:
        """The datasets that it needs."""
        return (self.dataset,)
