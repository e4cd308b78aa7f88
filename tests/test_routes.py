"""Both routes to the operations of a model give the same renumberings, and neither needs weights."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO

import weldnet
from networks import NETWORKS, Net, normal
from weldnet import models
from weldnet.errors import CaptureError, ModelError, UsageError
from weldnet.structure import Layout, Place, Space, Structure, capture, same_group

#: One or more for every kind of layer and wiring; studies/structure_routes.py compares them all.
COMPARED = (
    *("linear", "conv2d", "batch_norm", "layer_norm", "group_norm", "grouped", "depthwise", "transposed_grouped"),
    *("padded_shortcut", "recurrent", "in_place", "slice_written", "counting", "attention", "attention_by_hand"),
    *("encoder_layer", "tied_modules", "two_names", "unet", "glu", "dict_input", "two_outputs", "unused", "cumsum"),
    *("flatten", "linalg", "class_token", "embedding"),
)
#: The decomposition has rules where the whole operation may have none.
DECOMPOSED = ("weight_norm", "conv2d_circular")


def on_meta(model: nn.Module) -> nn.Module:
    """Copy a model to the meta device; tied parameters stay tied, as ``.to("meta")`` would not keep them."""
    twins = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in model.parameters()}
    return copy.deepcopy(model, twins | {id(b): torch.empty_like(b, device="meta") for b in model.buffers()})


# -- two routes, one structure ---------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPARED)
def test_both_routes_give_the_same_renumberings(name: str):
    model, x = NETWORKS[name].model(), NETWORKS[name].example()
    assert same_group(capture(model, x, route="dispatch"), capture(model, x, route="export"))


@pytest.mark.parametrize("name", DECOMPOSED)
def test_what_export_sees_more_of_is_right(name: str):
    model, x = NETWORKS[name].model(), NETWORKS[name].example()
    structure = capture(model, x, route="export")
    assert structure.log10_renumberings >= max(1, capture(model, x).log10_renumberings)
    assert weldnet.check(model, x, structure).error <= 1e-9


def test_export_honours_outputs():
    network = NETWORKS["hidden_output"]
    model, x = network.model(), network.example()
    whole, part = (capture(model, x, outputs, route="export") for outputs in (None, ["0"]))
    assert part.outputs == ("0",)
    assert same_group(part, capture(model, x, ["0"]))
    assert not same_group(part, whole)
    with pytest.raises(UsageError, match="no output 'logits'"):
        capture(model, x, "logits", route="export")


def test_regions_of_other_gradient_and_precision_settings_are_read_in_place():
    def forward(m: Net, x: Tensor) -> Tensor:
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            h = m.a(x).relu()
        return m.b(h)

    model, x = Net(forward, a=nn.Linear(5, 6), b=nn.Linear(6, 3)), torch.zeros(2, 5)
    assert same_group(capture(model, x, route="export"), capture(model, x))
    assert len(capture(model, x, route="export").spaces) == 1


@pytest.mark.parametrize("route", ["dispatch", "export"])
def test_what_a_model_keeps_of_its_first_pass_is_no_constant(route: str):
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.kept = nn.Linear(5, 6), nn.Linear(6, 3), None

        def forward(self, x: Tensor) -> Tensor:
            if self.kept is None:
                self.kept = self.a.bias * 2
            return self.b(self.a(x) * self.kept)

    model, x = Keeping(), torch.zeros(2, 5)
    assert [s.size for s in capture(model, x, route=route).spaces] == [6]
    assert model.kept is None


def test_a_branch_on_data_cannot_be_exported_and_its_place_is_named(capfd):
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.b(h.relu() if h.sum() > 0 else h)

    model = Net(forward, a=nn.Linear(5, 6), b=nn.Linear(6, 3))
    with pytest.raises(
        CaptureError, match=r"Net cannot be exported: a branch or a size depends on data at .*test_routes"
    ):
        capture(model, torch.zeros(2, 5), route="export")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("route", ["dispatch", "export", "auto"])
def test_capture_by_any_route_changes_nothing(route: str):
    network = NETWORKS["batch_norm"]
    model, x = network.model().train(), network.example()
    before, given = copy.deepcopy(model.state_dict()), x.clone()
    random_state = torch.random.get_rng_state()
    capture(model, x, route=route)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert torch.equal(x, given)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert torch.backends.mha.get_fastpath_enabled()


def test_errors_of_the_model_and_unknown_routes():
    with pytest.raises(ModelError, match=r"Linear fails on the example input float32\[2, 7\]") as caught:
        capture(nn.Linear(5, 3), torch.zeros(2, 7), route="export")
    assert not isinstance(caught.value, CaptureError)
    with pytest.raises(CaptureError, match="Net returns no tensor"):
        capture(Net(lambda m, x: 3.0, a=nn.Linear(5, 5)), torch.zeros(2, 5), route="export")
    with pytest.raises(UsageError, match="no route 'fx'; the routes are auto, dispatch, export"):
        capture(nn.Linear(5, 3), torch.zeros(2, 5), route="fx")


# -- without weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPARED)
def test_weights_are_not_needed(name: str):
    model, x = NETWORKS[name].model(), NETWORKS[name].example()
    assert capture(on_meta(model), x) == capture(model, x)


@pytest.mark.parametrize("name", ["linear", "attention", "grouped", "embedding", "dict_input", "tied_modules"])
def test_export_needs_no_weights_either(name: str):
    model, x = NETWORKS[name].model(), NETWORKS[name].example()
    assert same_group(capture(on_meta(model), x, route="export"), capture(model, x))


@pytest.mark.parametrize("route", ["dispatch", "export"])
def test_inputs_may_be_on_the_meta_device(route: str):
    with torch.device("meta"):
        model, ids = nn.Sequential(nn.Linear(4, 50), nn.Tanh(), nn.Linear(50, 2)), torch.zeros(3, 4)
    assert [s.size for s in capture(model, ids, route=route).spaces] == [50]


def test_a_billion_weights_take_no_memory():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1 << 20, 1 << 10), nn.ReLU(), nn.Linear(1 << 10, 1 << 20))
    structure = capture(model, torch.zeros(1, 1 << 20))
    assert [s.size for s in structure.spaces] == [1 << 10]
    assert all(p.is_meta for p in model.parameters())


def test_some_weights_may_be_missing():
    model = models.mlp(sizes=(4, 6, 6, 3))
    next(layer for layer in model.modules() if isinstance(layer, nn.Linear)).to("meta")
    assert [s.size for s in capture(model, torch.zeros(2, 4)).spaces] == [6, 6]


def test_branches_on_what_no_weight_decides_work_without_weights():
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.b(m.a(x).relu()) if float(x.sum()) > 0 else m.a(x)

    model = on_meta(Net(forward, a=nn.Linear(5, 6), b=nn.Linear(6, 3)))
    assert [s.size for s in capture(model, torch.ones(2, 5)).spaces] == [6]
    assert capture(model, -torch.ones(2, 5)).spaces == ()


def test_where_a_value_of_a_weight_is_read_auto_goes_on_to_export():
    model = on_meta(Net(lambda m, x: m.b(m.a(x)) * m.c.item(), a=nn.Linear(5, 6), b=nn.Linear(6, 3), c=normal(1)))
    x = torch.zeros(2, 5)
    with pytest.raises(CaptureError, match=r"no weights \(meta device\) and its forward pass reads a value"):
        capture(model, x, route="dispatch")
    assert [s.size for s in capture(model, x).spaces] == [6]


def test_where_both_routes_fail_the_first_says_why():
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.b(m.a(x).relu() if m.a.bias.sum() > 0 else m.a(x))

    with pytest.raises(CaptureError, match="reads a value that depends on them") as caught:
        capture(on_meta(Net(forward, a=nn.Linear(5, 6), b=nn.Linear(6, 3))), torch.zeros(2, 5))
    assert "\n" not in str(caught.value)


def test_a_wrong_shape_is_the_models_error_without_weights_too():
    with pytest.raises(ModelError, match=r"Sequential fails on the example input float32\[2, 7\]") as caught:
        capture(on_meta(nn.Sequential(nn.Linear(5, 3))), torch.zeros(2, 7))
    assert not isinstance(caught.value, CaptureError)


def test_without_weights_there_is_nothing_to_check():
    model, x = on_meta(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))), torch.zeros(2, 5)
    with pytest.raises(ModelError, match=r"Sequential has no weights \(meta device\): load them first"):
        weldnet.check(model, x, capture(model, x))


# -- comparing structures --------------------------------------------------------------------------


def flat(*places: Place, size: int = 6, name: str = "s") -> Structure:
    return Structure((Space(name, size),), places, (), {"w": (6, 4), "v": (6,)})


W, V = Place("w", "s", (0,)), Place("v", "s", (0,))


def test_names_orders_and_views_do_not_matter():
    one = flat(W, V)
    renamed = flat(dataclasses.replace(V, space="t"), dataclasses.replace(W, space="t"), name="t")
    backwards = Layout(offset=5, stride=-1)
    turned = flat(dataclasses.replace(W, layout=backwards), dataclasses.replace(V, layout=backwards))
    seen = flat(dataclasses.replace(W, view=(6, 2, 2)), V)
    for other in (one, renamed, turned, seen):
        assert same_group(one, other)
        assert same_group(other, one)


def test_other_places_ties_and_layouts_are_told_apart():
    one = flat(W, V)
    loose = Structure((Space("s", 6), Space("t", 6)), (W, dataclasses.replace(V, space="t")), (), one.shapes)
    crossed = flat(W, dataclasses.replace(V, layout=Layout(table=((1,), (0,), (2,), (3,), (4,), (5,)))))
    blocks = flat(
        dataclasses.replace(W, layout=Layout(0, 2, 2, 1)), dataclasses.replace(V, layout=Layout(0, 2, 2, 1)), size=3
    )
    for other in (flat(W), flat(V), loose, crossed, blocks):
        assert not same_group(one, other)
        assert not same_group(other, one)


def test_copies_must_move_alike():
    """The same positions, but the second unit's copies are the other way around."""
    pairs = ((0, 1), (2, 3), (4, 5))
    straight, mirrored, flipped = (
        flat(dataclasses.replace(V, layout=Layout(table=table)), size=3)
        for table in (pairs, (pairs[0], (3, 2), pairs[2]), tuple(pair[::-1] for pair in pairs))
    )
    assert same_group(straight, flipped)
    assert not same_group(straight, mirrored)


def test_blocks_must_be_those_of_the_same_parent():
    def nested(layout: Layout) -> Structure:
        spaces = (Space("p", 2), Space("c", 6, "p", 3))
        return Structure(spaces, (Place("v", "c", (0,), layout),), (), {"w": (6, 4), "v": (6,)})

    one, backwards, strided = (
        nested(Layout()),
        nested(Layout(5, -1)),
        nested(Layout(table=((0,), (2,), (4,), (1,), (3,), (5,)))),
    )
    assert same_group(one, backwards)
    assert not same_group(one, strided)
    assert not same_group(one, flat(V))


@pytest.mark.parametrize("name", ["grouped", "attention", "encoder_layer"])
def test_a_structure_without_one_place_is_another_one(name: str):
    structure = capture(NETWORKS[name].model(), NETWORKS[name].example())
    assert same_group(structure, structure)
    for place in structure.places:
        mutant = dataclasses.replace(structure, places=tuple(p for p in structure.places if p is not place))
        assert not same_group(structure, mutant)


# -- well-known architectures ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["squeezenet1_1", "gpt2", "mixtral", "LSTM projected"])
def test_both_routes_agree_on_well_known_architectures(name: str):
    torch.manual_seed(0)
    model, x = ZOO[name].build().eval(), ZOO[name].example()
    assert same_group(capture(model, x, route="dispatch"), capture(model, x, route="export"))


def test_experts_are_free_by_whichever_operation_their_rows_are_multiplied():
    """The library has an operation of its own, which the export route meets, for torch's grouped product."""
    torch.manual_seed(0)
    model, x = ZOO["mixtral"].build().eval(), ZOO["mixtral"].example()
    found = [capture(model, x, route=route) for route in ("dispatch", "export")]
    assert [round(structure.log10_renumberings, 1) for structure in found] == [767.3, 767.3]
    assert all("experts" in " ".join(space.name for space in structure.spaces) for structure in found)
