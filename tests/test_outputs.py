"""What a network returns besides its answer need not keep its order, and nothing that it returns is guessed at."""

from __future__ import annotations

import collections
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weldnet
from networks import Net, enliven
from weldnet.errors import CaptureError, StructureError, UsageError
from weldnet.structure import Referee, Structure, capture, check, output_tensors

X = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
HIDDEN = [("a.weight", (0,)), ("a.bias", (0,)), ("b.weight", (1,))]
Returned = Callable[[Tensor, Tensor], Any]

#: An output of the transformers library, as far as anybody can tell without importing it.
ModelOutput = type("ModelOutput", (OrderedDict,), {"__module__": "transformers.utils.generic"})


class Answer(ModelOutput):
    pass


class Cache:
    def __init__(self, tensor: Tensor) -> None:
        self.keys = tensor


@dataclass(frozen=True)
class Frozen:
    logits: Tensor
    hidden: Tensor


Pair = collections.namedtuple("Pair", "logits hidden")


def network(returned: Returned) -> nn.Module:
    """Six hidden units, of which ``returned`` (given logits and hidden units) may tell the world."""
    model = Net(lambda m, x: returned(m.b(torch.tanh(h := m.a(x))), h), a=nn.Linear(5, 6), b=nn.Linear(6, 3))
    return enliven(model, X)


def free(structure: Structure) -> list[tuple[str, tuple[int, ...]]]:
    return [(place.tensor, place.axes) for place in structure.places]


CONTAINERS: dict[str, tuple[Returned, str]] = {
    "tuple": (lambda y, h: (y, h), "0"),
    "list in dict": (lambda y, h: {"out": [h, y]}, "out.1"),
    "nested dicts": (lambda y, h: {"heads": {"first": y, "deep": {"h": h}}, "h": h}, "heads.first"),
    "a prefix": (lambda y, h: {"heads": {"first": y, "second": (y * 2,)}, "h": h}, "heads"),
    "integer keys": (lambda y, h: {1: h, 2: y}, "2"),
    "named tuple": (lambda y, h: Pair(y, h), "logits"),
    "frozen dataclass": (lambda y, h: Frozen(y, h), "logits"),
    "mapping": (lambda y, h: MappingProxyType({"logits": y, "hidden": h}), "logits"),
    "deque": (lambda y, h: collections.deque([y, h]), "0"),
    "beside a cache": (lambda y, h: {"y": y, "cache": Cache(h)}, "y"),
}


@pytest.mark.parametrize(("returned", "name"), CONTAINERS.values(), ids=CONTAINERS)
def test_hidden_units_are_free_where_only_the_answer_counts(returned: Returned, name: str):
    model = network(returned)
    structure = capture(model, X, outputs=[name])
    assert free(structure) == HIDDEN
    assert structure.outputs
    assert all(path == name or path.startswith(f"{name}.") for path in structure.outputs)
    assert check(model, X, structure).error <= 1e-9
    assert f"outputs that count: {', '.join(structure.outputs)}" in str(structure)


@pytest.mark.parametrize("name", [name for name in CONTAINERS if name != "beside a cache"])
def test_everything_counts_where_nothing_is_said(name: str):
    model = network(CONTAINERS[name][0])
    structure = capture(model, X)
    assert structure.outputs == ()
    assert free(structure) == []
    assert any(f.reason == "hidden, but returned as output" and f.tensor == "a.weight" for f in structure.frozen)
    assert "outputs that count" not in str(structure)
    part = capture(model, X, CONTAINERS[name][1])
    wrong = replace(structure, places=part.places, spaces=part.spaces)
    with pytest.raises(StructureError, match="changes the output"):
        check(model, X, wrong)


def test_no_names_select_everything_also_of_a_model_output():
    model = network(lambda y, h: Answer(logits=y, encoder_last_hidden_state=h))
    assert free(capture(model, X)) == HIDDEN
    assert free(capture(model, X, outputs=())) == []


def test_one_name_may_be_a_string():
    model = network(lambda y, h: {"logits": y, "l": h})
    assert capture(model, X, "logits") == capture(model, X, ["logits"])


def test_selecting_everything_leaves_nothing_out():
    structure = capture(network(lambda y, h: (y, h)), X, outputs=["1", "0"])
    assert structure.outputs == ()
    assert free(structure) == []


@pytest.mark.parametrize("name", ["logit", "logits.0", "", "0"])
def test_an_unknown_output_is_named_with_those_that_there_are(name: str):
    model = network(lambda y, h: {"logits": y, "rest": (h, Cache(h))})
    with pytest.raises(UsageError) as caught:
        capture(model, X, outputs=[name])
    assert str(caught.value) == (
        f"the forward pass returns no output {name!r}; it returns logits[4, 3], rest.0[4, 6], rest.1 (a Cache); "
        "choose among these"
    )


@pytest.mark.parametrize("route", ["dispatch", "export", "auto"])
def test_one_output_without_a_name_cannot_be_named(route: str):
    with pytest.raises(UsageError, match=r"no output 'logits'; it returns \[4, 3\]; it has no name: leave outputs out"):
        capture(network(lambda y, h: y), X, outputs="logits", route=route)


def test_what_may_hide_tensors_is_refused_only_where_it_counts():
    model = network(lambda y, h: {"logits": y, "rest": (h, Cache(h))})
    with pytest.raises(CaptureError, match=r"returns a Cache as 'rest.1', which may hide tensors; .* --outputs"):
        capture(model, X)
    with pytest.raises(CaptureError, match=r"a Cache as 'rest\.1'.* leave it out of the outputs that are named"):
        capture(model, X, outputs=["rest"])
    assert capture(model, X, outputs=["logits"]).outputs == ("logits",)


def test_other_networks_of_the_same_kind_must_have_the_outputs():
    structure = capture(network(lambda y, h: {"logits": y, "h": h}), X, outputs=["logits"])
    with pytest.raises(UsageError, match=r"returns no output 'logits'; it returns y\[4, 3\]"):
        check(network(lambda y, h: {"y": y}), X, structure)


# -- outputs of the transformers library -------------------------------------------------------------


def test_logits_and_loss_are_the_answer():
    model = network(
        lambda y, h: Answer(
            loss=y.sum(), start_logits=y, router_logits=(h, h), hidden_states=(h,), past_key_values=Cache(h)
        )
    )
    structure = capture(model, X)
    assert structure.outputs == ("loss", "start_logits")
    assert free(structure) == HIDDEN
    assert check(model, X, structure).error <= 1e-9


def test_without_logits_everything_but_the_caches_is_the_answer():
    model = network(lambda y, h: Answer(last=y, pooled=y * 2, mems=[h, h], cache_params=Cache(h)))
    structure = capture(model, X)
    assert structure.outputs == ("last", "pooled")
    assert free(structure) == HIDDEN


def test_a_plain_dict_is_not_taken_for_one_of_them():
    assert free(capture(network(lambda y, h: {"logits": y, "hidden_states": h}), X)) == []


def test_one_inside_another_value_is_read_in_the_same_way():
    structure = capture(network(lambda y, h: (y, Answer(logits=y, hidden_states=(h,)))), X)
    assert structure.outputs == ("0", "1.logits")


def test_a_field_with_weights_of_its_own_counts():
    """Its weights would stay behind when the units that they read are renumbered."""
    model = enliven(
        Net(
            lambda m, x: Answer(logits=m.b(h := torch.tanh(m.a(x))), pred_boxes=m.boxes(h), hidden_states=h),
            a=nn.Linear(5, 6), b=nn.Linear(6, 3), boxes=nn.Linear(6, 4),
        ),
        X,
    )  # fmt: skip
    structure = capture(model, X)
    assert structure.outputs == ("logits", "pred_boxes")
    assert free(structure) == [*HIDDEN, ("boxes.weight", (1,))]


# -- one selection everywhere ------------------------------------------------------------------------


def test_a_structure_keeps_its_outputs_in_json_and_older_ones_have_none():
    structure = capture(network(lambda y, h: (y, h)), X, outputs=["0"])
    assert Structure.from_json(structure.to_json()) == structure
    older = json.loads(structure.to_json())
    del older["buffers"]
    del older["outputs"]
    assert Structure.from_json(json.dumps(older)) == replace(structure, outputs=())


def test_the_referee_compares_what_counts():
    """Shifting b's bias changes the logits by one and leaves the hidden units as they are."""
    model = network(lambda y, h: (y, h))

    def error(outputs: Any) -> float:
        referee = Referee(model, X, torch.Generator(), outputs)
        return referee.error({**referee.state, "b.bias": referee.state["b.bias"] + 1})

    assert error(["1"]) == 0
    assert error(["0"]) == error(()) == error(None) > 0.1


def test_what_is_left_out_may_not_hide_that_the_pass_leaves_torch():
    class Leaves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Any:
            hidden = torch.tensor((x @ self.a.weight.T).detach().tolist(), dtype=x.dtype)
            return self.b(torch.relu(hidden)), hidden

    with pytest.raises(CaptureError):
        capture(enliven(Leaves(), X), X, outputs=["0"])


def test_fuse_uses_the_selection():
    networks = [network(lambda y, h: (y, h)), network(lambda y, h: (y, h))]
    result = weldnet.fuse(networks, X, outputs=["0"], progress=False)
    assert result.structure.outputs == ("0",)
    assert result.config["outputs"] == ["0"]
    assert max(row.equivalence for row in result.report.rows if row.role == "parent") <= 1e-9
    with pytest.raises(UsageError, match="no output 'logits'"):
        weldnet.fuse(networks, X, outputs=["logits"], progress=False)


def test_evaluation_reads_the_logits_of_a_model_output():
    images, labels = X, torch.tensor([0, 1, 2, 0])
    plain = weldnet.evaluate(network(lambda y, h: y), [(images, labels)])
    assert weldnet.evaluate(network(lambda y, h: Answer(logits=y, hidden_states=h)), [(images, labels)]) == plain


def test_plain_values_beside_tensors_are_no_outputs():
    y = torch.ones(2)
    result = {"y": y, "none": None, "text": "x", "number": 1.5, "shape": y.shape}
    assert [t is y for t in output_tensors(result)] == [True]
