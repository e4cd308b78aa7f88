"""What must hold for the structure of a random network: soundness, power, completeness.

Algebra can hide what is there: a sum of sums keeps more renumberings than its operations promise, a bias before a
softmax shows nowhere. So what seems to be missing is tried once more with every operation *generalised*: the same
inputs and outputs, the same indices treated alike, no other laws. Only what is missing there is missing.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from random_networks import RandomNetwork, Spec
from weldnet.structure import Place, Structure, capture, random_renumbering, renumber

__all__ = ["EXCUSES", "Completeness", "Verdict", "count_renumberings", "generalised", "judge"]

TOLERANCE, EVIDENCE = 1e-9, 1e-7

#: Reasons to freeze more than must stay; a frozen axis that has another one must really stay.
EXCUSES = (
    "units tied to two spaces at once",
    "units tied to one another in a way that is not a renumbering",
    "no rule for",
    "the order matters to",
    "moved by a convolution window",
    "moved by a window",
    "looked up by numbers",
    "used both in groups and as a whole",
    "used with different groups",
    "not used by the forward pass",
)

#: Steps with more freedom than weldnet sees: copies of one space's units that are numbered by the units of another;
#: units that are picked one by one.
UNSEEN = frozenset({"repeat", "unbind"})

#: Operations of the steps that are beyond all rules; any other one must have a rule.
WITHOUT_RULE = frozenset({"aten._linalg_solve_ex", "aten.linalg_matrix_exp", "aten.histc"})

State = dict[str, Tensor]


@dataclass(frozen=True)
class Completeness:
    """How many renumberings keep the function: as captured, and as found among all ``tried``."""

    captured: int
    found: int
    tried: int
    excuses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What was seen on one network.

    Args:
        structure: as captured.
        unsound: renumberings that change the output, in words.
        powerless: places that can be forgotten although the output depends on them.
        hidden: places that can be forgotten because of the algebra of their operations.
        completeness: if there are few enough reorderings to try them all.
    """

    structure: Structure
    unsound: tuple[str, ...] = ()
    powerless: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    completeness: Completeness | None = None

    @property
    def faults(self) -> dict[str, str]:
        """The counter-examples, by property."""
        found = {"soundness": "; ".join(self.unsound), "power": "; ".join(self.powerless)}
        if self.completeness is not None and self.completeness.found != self.completeness.captured:
            found["completeness"] = f"{self.completeness}"
        if missing := set(self.structure.unknown) - WITHOUT_RULE:
            found["completeness"] = f"no rule for {', '.join(sorted(missing))}"
        return {name: words for name, words in found.items() if words}


def judge(spec: Spec, *, most: int = 5000, seed: int = 0) -> Verdict | None:
    """Capture a random network and test what must hold; None if it answers with NaN or Inf, or not at all.

    Args:
        spec: the network.
        most: reorderings to try for completeness; a network that has more is not tried.
        seed: of weights, inputs and renumberings.
    """
    model = RandomNetwork(spec, seed)
    case = _Case(model, model.example(seed + 1), seed)
    if not bool(torch.isfinite(case.before).all()) or float(case.before.abs().max()) < 1e-6:
        return None
    structure = capture(model, case.example)
    unsound = tuple(case.unsound(structure))
    if unsound:
        return Verdict(structure, unsound)
    powerless, hidden = case.powerless(structure)
    tried = None if any(step.name in UNSEEN for step in spec.steps) else case.completeness(structure, most)
    return Verdict(structure, (), powerless, hidden, tried)


class _Case:
    """A model with its answer, and what changes it."""

    def __init__(self, model: RandomNetwork, example: Any, seed: int) -> None:
        self.model, self.example = model, example
        self.state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self.generator = torch.Generator().manual_seed(seed)
        self.before = answer(model, self.state, example)

    def change(self, state: State) -> float:
        """Return the relative change of the output."""
        after = answer(self.model, state, self.example)
        change = float((after - self.before).abs().max() / self.before.abs().max())
        return change if change == change else math.inf

    def shows(self, state: State) -> bool:
        """Whether the output changes when every operation is generalised."""
        with generalised():
            before, after = (answer(self.model, s, self.example) for s in (self.state, state))
        return not float((after - before).abs().max()) <= TOLERANCE * float(before.abs().max())

    def unsound(self, structure: Structure) -> Iterator[str]:
        together = [random_renumbering(structure, self.generator) for _ in range(2)]
        for sources in together:
            if not (error := self.change(renumber(self.state, structure, sources))) <= TOLERANCE:
                yield f"all spaces together change the output by {error:.1e}"
        for root in structure.roots:
            names = {space.name for space in structure.tree(root.name)}
            alone = {name: source for name, source in together[0].items() if name in names}
            if not (error := self.change(renumber(self.state, structure, alone))) <= TOLERANCE:
                yield f"space {root.name!r} alone changes the output by {error:.1e}"

    def powerless(self, structure: Structure) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Forget each place in turn; return the places that nothing shows, and those that algebra hides."""
        nothing, hidden = [], []
        for place in structure.places:
            mutant = replace(structure, places=tuple(p for p in structure.places if p is not place))
            quiet = [self._quiet(structure, mutant, place) for _ in range(2)]
            if all(quiet):
                words = f"{place.tensor} axes {place.axes} in {place.space!r}"
                (hidden if "hidden" in quiet or self._dead(place, structure) else nothing).append(words)
        return tuple(nothing), tuple(hidden)

    def _quiet(self, structure: Structure, mutant: Structure, place: Place) -> str:
        """Say whether forgetting the place does not show, or only where operations have no laws."""
        sources = moving(structure, self.generator)
        state = renumber(self.state, mutant, sources)
        if torch.equal(state[place.tensor], renumber(self.state, structure, sources)[place.tensor]):
            joint = any(other.view for other in structure.places_in(place.tensor))  # which moves both axes
            return "" if joint else "never moves"
        if not self._moved(mutant, place.space, sources) or self.change(state) > EVIDENCE:
            return ""
        return "hidden" if self.shows(state) else "quiet"

    def _dead(self, place: Place, structure: Structure) -> bool:
        """Whether the output depends on no value in this place."""
        tensor = self.state[place.tensor]
        noise = torch.rand(tensor.shape, generator=self.generator, dtype=torch.float64)
        if place.view is None:
            still = torch.ones(tensor.shape[place.axes[0]], dtype=torch.bool)
            still[torch.as_tensor(structure.positions(place).ravel())] = False
            noise.movedim(place.axes[0], 0)[still] = 0
        return not self.shows({**self.state, place.tensor: tensor + noise})

    def _any_dead(self) -> bool:
        """Whether there is an index of an axis of a tensor that nothing depends on."""
        for name, tensor in self.state.items():
            for axis, size in enumerate(tensor.shape):
                for index in range(size):
                    moved = tensor.clone()
                    moved.select(axis, index).add_(0.3)
                    if not self.shows({**self.state, name: moved}):
                        return True
        return False

    def _moved(self, mutant: Structure, space: str, sources: State) -> bool:
        """Whether anything is left that moves with a space: one in a single place has nothing to fit to."""
        trees = ({s.name for s in mutant.tree(root.name)} for root in mutant.roots)
        names = next(tree for tree in trees if space in tree)
        moved = renumber(self.state, mutant, {name: sources[name] for name in names})
        return any(not torch.equal(tensor, moved[name]) for name, tensor in self.state.items())

    def completeness(self, structure: Structure, most: int) -> Completeness | None:
        """Count what keeps the function among all reorderings that move no axis frozen with an excuse."""
        excused: dict[tuple[str, int], int] = {}
        excuses = dict.fromkeys(f.reason for f in structure.frozen if any(excuse in f.reason for excuse in EXCUSES))
        for item in structure.frozen:
            if item.reason in excuses:
                excused[item.tensor, item.axis] = excused.get((item.tensor, item.axis), 0) + item.count
        if any(structure.shapes[name][axis] != count for (name, axis), count in excused.items()):
            return None  # part of an axis moves, and part has an excuse
        orders = {
            name: Orders(tuple(tensor.shape), self.model.groups.get(name, 1), {a for n, a in excused if n == name})
            for name, tensor in self.state.items()
        }
        tried = math.prod(o.count for o in orders.values())
        if tried > most:
            return None
        try:
            found = count_renumberings(self.model, self.example, self.state, orders)
        except (RuntimeError, NotImplementedError, ValueError):
            return None  # an operation that torch.vmap does not know
        captured = round(10**structure.log10_renumberings)
        if found > captured and self._any_dead():
            return None
        return Completeness(captured, found, tried, tuple(excuses))


def moving(structure: Structure, generator: torch.Generator) -> State:
    """Draw a renumbering in which no unit and no block stays, unless it is alone."""
    sources: State = {}
    for space in structure.spaces:
        parts = (
            [range(space.size)]
            if space.parent is None
            else [range(b * space.block, (b + 1) * space.block) for b in sources[space.parent].tolist()]
        )
        sources[space.name] = torch.cat([_cycle(part, generator) for part in parts])
    return sources


def _cycle(part: range, generator: torch.Generator) -> Tensor:
    order = torch.randperm(len(part), generator=generator)
    source = torch.empty_like(order)
    source[order] = order.roll(1)
    return source + part.start


def answer(model: nn.Module, state: State, example: Sequence[Tensor]) -> Tensor:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return torch.func.functional_call(model, state, tuple(example))


# -- completeness by brute force -----------------------------------------------------------------------


@dataclass(frozen=True)
class Orders:
    """All reorderings of a tensor along its axes, but for those that stay.

    In a weight of a grouped convolution the second axis has an order for each group.
    """

    shape: tuple[int, ...]
    groups: int = 1
    still: frozenset[int] | set[int] = frozenset()

    @property
    def count(self) -> int:
        sizes = [1 if axis in self.still else math.factorial(n) for axis, n in enumerate(self.shape)]
        if len(sizes) > 1:
            sizes[1] **= self.groups
        return math.prod(sizes)

    def of(self, tensor: Tensor) -> Tensor:
        """Stack the tensor in all its orders, the order that it has first."""
        return torch.stack([self._moved(tensor, orders) for orders in itertools.product(*self._choices())])

    def _choices(self) -> Iterable[Sequence[Any]]:
        for axis, size in enumerate(self.shape):
            every = [tuple(range(size))] if axis in self.still else list(itertools.permutations(range(size)))
            yield every if axis != 1 or self.groups == 1 else list(itertools.product(every, repeat=self.groups))

    def _moved(self, tensor: Tensor, orders: Sequence[Any]) -> Tensor:
        for axis, order in enumerate(orders):
            if axis == 1 and self.groups > 1:
                parts = zip(tensor.chunk(self.groups), order, strict=True)
                tensor = torch.cat([part[:, list(own)] for part, own in parts])
            else:
                tensor = tensor.index_select(axis, torch.tensor(order, dtype=torch.int64))
        return tensor


def count_renumberings(model: nn.Module, example: Any, state: State, orders: dict[str, Orders]) -> int:
    """Count the reorderings that keep the function, whatever the laws of its operations."""
    stacks = {name: orders[name].of(tensor) for name, tensor in state.items()}
    numbers = [torch.arange(len(stack)) for stack in stacks.values()]
    rows = torch.cartesian_prod(*numbers).reshape(-1, len(numbers))
    kept = _kept(model, example, stacks, rows, contextlib.nullcontext)
    return len(_kept(model, example, stacks, kept, generalised))


def _kept(model: nn.Module, example: Any, stacks: State, rows: Tensor, mode: Callable[[], Any]) -> Tensor:
    """Return the rows with the output of the first one."""
    want, kept = None, []
    for some in rows.split(4096):
        states = {name: stack[some[:, i]] for i, (name, stack) in enumerate(stacks.items())}
        with mode():
            found = torch.vmap(lambda state: answer(model, state, example).flatten())(states)
        want = found[:1] if want is None else want
        kept.append(some[(found - want).abs().amax(1) <= TOLERANCE * want.abs().max()])
    return torch.cat(kept)


# -- operations without laws ---------------------------------------------------------------------------

#: What only moves, makes or chooses numbers, and what is beyond all rules, is left as it is.
_EXACT = frozenset(
    [
        "clone",
        "_to_copy",
        "copy",
        "fill",
        "lift_fresh_copy",
        "alias",
        "detach",
        "dropout",
        "bernoulli",
        "masked_fill",
        "arange",
        "eye",
        "zeros",
        "ones",
        "full",
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
        "new_zeros",
        "new_ones",
        "view",
        "reshape",
    ]
)
_GENERAL = frozenset(
    [
        "sum",
        "mean",
        "amax",
        "amin",
        "max",
        "min",
        "var",
        "std",
        "prod",
        "logsumexp",
        "norm",
        "linalg_vector_norm",
        "_softmax",
        "_log_softmax",
        "softmax",
        "_safe_softmax",
        "mm",
        "bmm",
        "mv",
        "dot",
        "addmm",
        "baddbmm",
        "addmv",
        "matmul",
        "linear",
        "convolution",
        "_convolution",
        "native_batch_norm",
        "batch_norm",
        "cudnn_batch_norm",
        "_native_batch_norm_legit_no_training",
        "_native_batch_norm_legit",
        "native_layer_norm",
        "native_group_norm",
        "glu",
        "_prelu_kernel",
        "_weight_norm_interface",
        "_trilinear",
        "_cdist_forward",
        "_euclidean_dist",
        "max_pool2d_with_indices",
        "avg_pool1d",
        "avg_pool2d",
        "_adaptive_avg_pool2d",
        "adaptive_max_pool2d",
        "where",
        "var_mean",
    ]
)


#: Where only the largest counts, or one branch, all count after bending.
_IN_PLACE_OF: dict[str, Callable[..., Any]] = {
    "amax": lambda x, dim=(), keepdim=False: x.sum(dim, keepdim),
    "amin": lambda x, dim=(), keepdim=False: x.sum(dim, keepdim),
    "max_pool2d_with_indices": lambda x, size, stride=(), padding=0, *more: torch.nn.functional.avg_pool2d(
        x, size, stride or size, padding
    ),
    "adaptive_max_pool2d": torch.nn.functional.adaptive_avg_pool2d,
    "where": lambda condition, x, y: x * y,
    "_prelu_kernel": torch.mul,
}
#: A softmax or a norm of a single number is the same for every number.
_OWN_STATISTICS = frozenset(
    [
        "_softmax",
        "_log_softmax",
        "softmax",
        "_safe_softmax",
        "native_layer_norm",
        "native_group_norm",
        "native_batch_norm",
        "_weight_norm_interface",
    ]
)


class generalised(TorchDispatchMode):  # noqa: N801
    """Add to what each operation gives a bent copy of what it gives for bent inputs: no law survives that."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func.overloadpacket).removeprefix("aten.").rstrip("_")
        if name in _EXACT or not (name in _GENERAL or torch.Tag.pointwise in func.tags):
            return func(*args, **kwargs)
        number = itertools.count()
        bent_args, bent_kwargs = pytree.tree_map_only(Tensor, lambda t: _bent(t, next(number)), (args, kwargs))
        more = _IN_PLACE_OF.get(name, func)(*bent_args, **bent_kwargs)
        if name in _OWN_STATISTICS:
            more = _by_itself(name, more if isinstance(more, Tensor) else more[0], bent_args)
        plain = func(*args, **kwargs)
        mixed = _mixed(plain, more)
        return plain.copy_(mixed) if func._schema.is_mutable else mixed


def _bent(t: Tensor, number: int) -> Tensor:
    return 1.2 + torch.sin(1.7 * t + 0.4 + 0.9 * number) if t.is_floating_point() else t


def _by_itself(name: str, more: Tensor, args: Sequence[Any]) -> Tensor:
    """Multiply by the value itself and by the affine parameters."""
    first, *others = (t for t in args if isinstance(t, Tensor))
    for t in others:
        per_channel = name in ("native_group_norm", "native_batch_norm")
        more = more * (t.view(-1, *[1] * (more.dim() - 2)) if per_channel else t)
    return (1 + more) * first


def _mixed(plain: Any, more: Any) -> Any:
    """Change the first output; the others are its helpers."""
    if not isinstance(plain, Tensor):
        first, *others = plain
        return (_mixed(first, more if isinstance(more, Tensor) else more[0]), *others)
    return plain + 0.3 * torch.sin(1.3 * more + 0.2) if plain.is_floating_point() else plain
