"""Sizes between one parent and all of them: what is kept apart, what it takes, and that it loads again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import weldnet
from test_laws import ATTENTION, GROUPED, MLP, NETWORKS, difference, renumbered
from weldnet import models
from weldnet.activations import carry_channels, find_layers
from weldnet.assignment import Permutation, Plan, injection, targets_of
from weldnet.checkpoints import load, load_into, read_metadata, resized, save
from weldnet.cli import main
from weldnet.errors import AlignmentError, CheckpointError, ModelError, UsageError
from weldnet.fusion import Averaged, NoRepair, Repaired, fuse
from weldnet.fusion._room import find_room
from weldnet.structure import Layout, Place, Space, Structure, Wider, capture, used_entries, widened, wider_shape

#: Networks in which every hidden unit can be kept apart.
ROOMY = [n for n in NETWORKS if str(n) in ("mlp", "residual", "depthwise", "recurrent")]


def answers(model: nn.Module, network) -> torch.Tensor:
    with torch.no_grad():
        return model(network.inputs)


def fused(network, seeds, **options):
    parents = [network.model(seed) for seed in seeds]
    return parents, fuse(parents, network.inputs, progress=False, repair="none", **options)


# -- laws ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ROOMY, ids=str)
@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.2, 0.8], [0.5, 0.2, 0.3]], ids=str)
def test_all_parents_kept_whole_answer_with_the_mean_of_their_outputs(network, weights):
    parents, result = fused(network, range(1, 1 + len(weights)), size=len(weights), weights=weights)
    expected = sum(w * answers(p, network) for w, p in zip(weights, parents, strict=True))
    assert difference(answers(result.model, network), expected) <= 1e-12
    assert result.report.size.used <= len(weights)
    assert not result.report.size.kept
    for before, after in result.report.size.apart.values():
        assert after == len(weights) * before


@pytest.mark.parametrize("network", NETWORKS, ids=str)
@pytest.mark.parametrize("size", [1.1, 1.5, 2.6, 3])
def test_a_network_fused_with_itself_answers_as_before_at_any_size(network, size):
    result = fuse([network.model(1)] * 3, network.inputs, progress=False, size=size, method="identity", repair="none")
    assert difference(answers(result.model, network), answers(network.model(1), network)) <= 1e-12


@pytest.mark.parametrize("network", NETWORKS, ids=str)
@pytest.mark.parametrize("count", [2, 3])
def test_the_numbers_in_use_are_counted_exactly_and_fit_the_budget(network, count):
    whole = sum(p.numel() for p in network.model(0).parameters())
    before = 0
    for size in (1.05, 1.3, 1.8, count):
        _, result = fused(network, range(count), size=size, method="identity")
        used = sum(int((p != 0).sum()) for p in result.model.parameters())
        assert result.report.size.parameters == used, "zeros that are there by construction were miscounted"
        assert used <= size * whole, "the budget is exceeded"
        assert used >= before, "a larger budget gave a smaller network"
        assert result.report.parameters == sum(p.numel() for p in result.model.parameters())
        before = used


def test_the_budget_is_used():
    for size in (1.2, 1.5, 1.9):
        _, result = fused(replace(MLP, width=40), (1, 2), size=size)
        assert size - 0.02 <= result.report.size.used <= size


@pytest.mark.parametrize("network", ROOMY, ids=str)
def test_renumbering_a_parent_first_does_not_change_the_fused_function(network):
    _, result = fused(network, (1, 2), size=1.4)
    other = network.model(2)
    other.load_state_dict(renumbered(network, other.state_dict(), seed=5))
    again = fuse([network.model(1), other], network.inputs, progress=False, repair="none", size=1.4)
    assert difference(answers(again.model, network), answers(result.model, network)) <= 1e-9


def test_inputs_stay_as_they_were():
    parents, _ = fused(MLP, (1, 2), size=1.5)
    for parent, seed in zip(parents, (1, 2), strict=True):
        assert all(torch.equal(t, MLP.state(seed)[name]) for name, t in parent.state_dict().items())


def test_the_units_that_match_worst_are_kept_apart():
    a, b = MLP.model(1), MLP.model(1)
    with torch.no_grad():
        for net, sign in ((a, 1), (b, -1)):
            net[0].weight[3] += sign * 5
            net[2].weight[:, 3] += sign * 5
    result = fuse([a, b], MLP.inputs, progress=False, size=1.15, method="identity")
    before, after = result.report.size.apart["0"]
    assert after > before
    apart = targets_of(result.alignment["b"]["0"]) != targets_of(result.alignment["a"]["0"])
    assert bool(apart[3]), "the unit that differs most was averaged"


# -- the formula -----------------------------------------------------------------------------------

HAND = Structure(
    (Space("s", 2), Space("t", 2)),
    (Place("w", "s", (0,)), Place("w", "t", (1,), role="reads"), Place("b", "s", (0,))),
    (),
    {"w": (2, 2), "b": (2,)},
)


def test_rows_are_averaged_over_their_owners_and_columns_hold_each_networks_own():
    wider = Wider(
        HAND,
        {"s": torch.tensor([[0, 1], [0, 2]]), "t": torch.tensor([[0, 1], [2, 1]])},
        {"s": 3, "t": 3},
    )
    one, two = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    got = widened("w", [one, two], wider, (0.25, 0.75))
    assert got.tolist() == [[0.25, 15.5, 7.5], [3.0, 4.0, 0.0], [0.0, 40.0, 30.0]]
    assert used_entries("w", wider) == 7
    bias = widened("b", [torch.tensor([1.0, 2.0]), torch.tensor([5.0, 6.0])], wider, (0.25, 0.75))
    assert bias.tolist() == [4.0, 2.0, 6.0]


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Layout(0, 2, 2, 1), [0, 1, 2, 3, 8, 9, 4, 5, 6, 7]),  # units with their pixels: new ones behind the last
        (Layout(0, 1, 2, 2), [0, 1, 8, 2, 3, 9, 4, 5, 6, 7]),  # pixels with their units: new ones in every run
        (Layout(3, 1, 1, 1), [0, 1, 2, 3, 4, 8, 5, 6, 7]),  # a part of a concatenation
    ],
    ids=["flattened", "channels last", "joined"],
)
def test_new_units_lie_where_the_forward_pass_puts_them(layout, expected):
    structure = Structure((Space("s", 2),), (Place("w", "s", (0,), layout),), (), {"w": (8,)})
    wider = Wider(structure, {"s": torch.tensor([[0, 1], [0, 2]])}, {"s": 3})
    old = torch.arange(8.0)
    got = widened("w", [old, old], wider, (1.0, 0.0))
    assert wider_shape("w", wider) == (len(expected),)
    kept = torch.tensor([value < 8 for value in expected])
    assert got[kept].tolist() == [float(v) for v in expected if v < 8]


# -- what can be widened ---------------------------------------------------------------------------


def room_of(model, x):
    return find_room(model, capture(model, x), x, 0)


class Mixed(nn.Module):
    """Units that are weighed against one another."""

    def __init__(self, mix):
        super().__init__()
        self.up, self.down, self.mix = nn.Linear(4, 6), nn.Linear(6, 3), mix

    def forward(self, x):
        return self.down(self.mix(self.up(x)))


@pytest.mark.parametrize(
    "mix",
    [nn.LayerNorm(6), nn.Softmax(-1), nn.GroupNorm(1, 6), lambda h: h / h.norm(dim=-1, keepdim=True)],
    ids=["layer norm", "softmax", "one group", "unit length"],
)
def test_units_that_are_weighed_against_one_another_stay(mix):
    room = room_of(Mixed(mix), torch.randn(2, 4))
    assert not room.spaces
    assert "not work one by one" in room.kept["up"]


def test_widths_that_a_forward_pass_takes_for_granted_stay():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.mid, self.down = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.down(self.mid(self.up(x).view(-1, 6)).relu())

    x = torch.randn(2, 4)
    room = room_of(Fixed(), x)
    assert room.spaces == ("mid",)
    assert "do not run" in room.kept["up"]
    result = fuse([Fixed(), Fixed()], x, size=1.3, progress=False)
    assert list(result.report.size.apart) == ["mid"]
    assert "keep their width: up" in str(result)


def test_a_role_read_wrongly_is_noticed():
    x = MLP.inputs
    structure = capture(MLP.model(0), x)
    for index, place in enumerate(structure.places):
        wrong = replace(place, role="reads" if place.role == "writes" else "writes")
        places = (*structure.places[:index], wrong, *structure.places[index + 1 :])
        room = find_room(MLP.model(0), replace(structure, places=places), x, 0)
        assert place.space not in room.spaces, f"{place.tensor} was read as if it {wrong.role}"


def test_nothing_to_widen_is_said_in_the_report():
    _, result = fused(GROUPED, (1, 2), size=1.5)
    assert result.report.size.apart == {}
    assert "nothing was kept apart" in str(result)
    assert "nested" in str(result)
    _, plain = fused(GROUPED, (1, 2))
    assert all(torch.equal(t, plain.state_dict()[name]) for name, t in result.state_dict().items())


def test_attention_keeps_its_stream_and_grows_inside():
    _, result = fused(ATTENTION, (1, 2), size=1.5)
    assert list(result.report.size.apart) == ["up"]
    assert "MultiheadAttention" in str(result)


# -- repairs ---------------------------------------------------------------------------------------


def test_a_repair_sees_the_wider_network_and_where_its_parents_lie():
    seen: list[Averaged] = []

    class Spy:
        def __call__(self, averaged, data, /):
            seen.append(averaged)
            return Repaired(averaged.model, "spied")

    parents, result = fused(MLP, (1, 2), size=1.5)
    fuse(parents, MLP.inputs, progress=False, size=1.5, repair=Spy())
    (averaged,) = seen
    assert averaged.structure.space("0").size == averaged.model[0].out_features > 9
    assert averaged.structures["a"].space("0").size == 9
    layer, wide = (
        find_layers(parents[0], averaged.structures["a"])[0],
        find_layers(averaged.model, averaged.structure)[0],
    )
    rows = torch.randn(5, 9)
    for name in "ab":
        target = (wide.places, averaged.structure, wide.channels)
        moved = carry_channels(rows, layer.places, averaged.structures[name], averaged.alignment[name], target)
        coupling = averaged.alignment[name]["0"]
        assert torch.equal(moved[:, targets_of(coupling)], rows)
        assert int((moved != 0).any(0).sum()) == 9
    assert result.structure.space("0").size == result.model[0].out_features


def test_batch_norm_statistics_are_estimated_anew_in_the_wider_network():
    def make():
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))

    parents = [make(), make()]
    x = torch.randn(64, 1, 8, 8)
    result = fuse(parents, x[:1], size=1.5, data=x, repair=weldnet.BatchNormReset(), progress=False)
    norm = result.model[1]
    assert norm.num_features == len(norm.running_mean) > 4
    mean = result.model[0](x).mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean, mean, atol=1e-4, rtol=1e-4)


# -- injections ------------------------------------------------------------------------------------


def test_injections_name_one_universe_unit_for_each_unit():
    plan = injection(torch.tensor([2, 0]), 4)
    assert plan.columns.tolist() == [1, 0, 1, 0]
    assert targets_of(plan).tolist() == [2, 0]
    assert targets_of(Permutation(torch.tensor([2, 0, 1]))).tolist() == [1, 2, 0]
    with pytest.raises(AlignmentError, match="shares units out"):
        targets_of(Plan(torch.full((2, 2), 0.5)))
    with pytest.raises(AlignmentError, match="shares units out"):
        targets_of(Plan(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), columns=torch.tensor([2.0, 0.0])))


def test_an_alignment_with_injections_is_saved_and_loaded(tmp_path):
    _, result = fused(MLP, (1, 2), size=1.5)
    result.alignment.save(tmp_path / "alignment.safetensors")
    assert weldnet.Alignment.load(tmp_path / "alignment.safetensors").couplings == result.alignment.couplings


# -- resizing --------------------------------------------------------------------------------------


def test_a_resized_model_is_one_that_was_built_that_wide():
    for name, shape in (("vgg11", (2, 3, 32, 32)), ("resnet20", (2, 3, 32, 32)), ("lenet", (2, 1, 28, 28))):
        narrow, wide = (models.build(name, width=w) for w in (0.25, 0.5))
        other = resized(narrow, wide.state_dict(), torch.randn(shape))
        assert str(other) == str(wide)
        load_into(other, wide.state_dict(), "wide")
        x = torch.randn(shape)
        assert torch.equal(other.eval()(x), wide.eval()(x))
        assert str(narrow) != str(wide), "the model itself was changed"


def test_every_kind_of_module_keeps_its_sizes_true():
    def make(w):
        return nn.ModuleDict({
            "linear": nn.Linear(w, 2 * w), "conv": nn.Conv1d(w, 2 * w, 3), "depthwise": nn.Conv2d(w, w, 3, groups=w),
            "up": nn.ConvTranspose2d(w, 2 * w, 2), "batch": nn.BatchNorm2d(w),
            "instance": nn.InstanceNorm1d(w, affine=True),
            "group": nn.GroupNorm(2, w), "layer": nn.LayerNorm(w), "rms": nn.RMSNorm(w), "table": nn.Embedding(5, w),
            "prelu": nn.PReLU(w), "bilinear": nn.Bilinear(w, 2 * w, 3 * w),
        })  # fmt: skip

    assert str(resized(make(4), make(6).state_dict())) == str(make(6))


def test_tied_tensors_stay_tied_and_flags_stay():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    net[0].weight.requires_grad_(False)
    other = resized(net, {"0.weight": (6, 6), "1.weight": (6, 6)})
    assert other[0].weight is other[1].weight
    assert not other[0].weight.requires_grad
    assert (other[1].in_features, other[1].out_features) == (6, 6)


class Viewed(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 8, 3), nn.Linear(8 * 4, 3)

    def forward(self, x):
        return self.two(self.one(x).view(-1, 32))


def test_a_forward_pass_with_a_width_in_it_is_refused_in_one_line():
    wide = {"one.weight": (12, 1, 3, 3), "one.bias": (12,), "two.weight": (3, 48)}
    with pytest.raises(ModelError, match=r"Viewed does not run at other widths: .*takes a width for granted") as caught:
        resized(Viewed(), wide, torch.randn(2, 1, 4, 4))
    assert "\n" not in str(caught.value)


def test_an_answer_of_another_shape_is_refused():
    wide = {"one.weight": (16, 1, 3, 3), "one.bias": (16,)}  # twice the rows, in silence
    with pytest.raises(ModelError, match=r"it answers in the shapes \[\(4, 3\)\], not \[\(2, 3\)\]"):
        resized(Viewed(), wide, torch.randn(2, 1, 4, 4))


def test_modules_whose_sizes_are_unknown_are_refused():
    with pytest.raises(ModelError, match="'0' is a LSTM, whose sizes weldnet cannot change"):
        resized(nn.Sequential(nn.LSTM(3, 4)), {"0.weight_ih_l0": (24, 3)})
    with pytest.raises(CheckpointError, match="no tensor 'nothing'"):
        resized(nn.Linear(2, 2), {"nothing": (3,)})


# -- files -----------------------------------------------------------------------------------------


def test_a_wider_network_is_saved_and_loaded_bit_for_bit(tmp_path):
    for network in (MLP, NETWORKS[1]):
        _, result = fused(network, (1, 2), size=1.5)
        result.save(tmp_path / "wide.safetensors")
        again = weldnet.load_model(tmp_path / "wide.safetensors", network.model(0)).eval()
        assert torch.equal(answers(again, network), answers(result.model, network))
        assert str(again) == str(result.model)
        widths = json.loads(read_metadata(tmp_path / "wide.safetensors")["widths"])
        assert widths == {space: after for space, (_, after) in result.report.size.apart.items()}


def test_load_model_takes_files_of_the_models_own_width_too(tmp_path):
    save(MLP.state(3), tmp_path / "own.pt")
    again = weldnet.load_model(tmp_path / "own.pt", MLP.model(0))
    assert all(torch.equal(t, MLP.state(3)[name]) for name, t in again.state_dict().items())
    save(replace(MLP, width=11).state(3), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="another shape"):
        weldnet.load_model(tmp_path / "other.safetensors", MLP.model(0))


def test_formats_without_metadata_are_refused_for_wider_networks(tmp_path):
    _, result = fused(MLP, (1, 2), size=1.5)
    with pytest.raises(CheckpointError, match=r"only \.safetensors has a place"):
        result.save(tmp_path / "wide.pt")
    assert not list(tmp_path.iterdir())


SPEC = "mlp?sizes=64,12,10"


@pytest.fixture
def two_files(tmp_path):
    files = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        files.append(tmp_path / f"{seed}.safetensors")
        save(models.build("mlp", sizes=(64, 12, 10)).state_dict(), files[-1])
    return files


@pytest.fixture
def cli(capsys):
    def run(*arguments):
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_command_line_writes_and_reads_wider_networks(cli, two_files, tmp_path):
    out = tmp_path / "wide.safetensors"
    code, text, error = cli("fuse", *two_files, "--model", SPEC, "--input", "1,64", "-o", out, "--size", 1.5, "--json")
    assert code == 0, error
    size = json.loads(text)["size"]
    assert 1.3 <= size["used"] <= 1.5
    assert load(out)["layers.0.weight"].shape == (size["apart"]["layers.0"][1], 64)
    for command in (("evaluate", out, "--data", "digits"), ("check", out, "--input", "1,64")):
        code, _, error = cli(command[0], command[1], "--model", SPEC, *command[2:])
        assert code == 0, error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--size", "0.5"), "greater than or equal to 1"),
        (("--size", "3"), "size is 3.0; give a number from 1"),
        (("--size", "nan"), "nan"),
        (("--size", "1.5", "-o", "wide.pt"), "no place for the widths"),
    ],
)
def test_sizes_that_make_no_sense_are_wrong_usage(cli, two_files, arguments, says):
    base = ("-o", "out.safetensors") if "-o" not in arguments else ()
    code, _, error = cli("fuse", *two_files, "--model", SPEC, "--input", "1,64", *base, *arguments)
    assert code == 2
    assert says in error


def test_size_is_in_the_saved_settings(tmp_path):
    _, result = fused(MLP, (1, 2), size=1.5)
    result.save(tmp_path / "wide.safetensors")
    assert json.loads(read_metadata(tmp_path / "wide.safetensors")["config"])["size"] == 1.5


def test_a_size_does_not_change_what_repair_none_means():
    parents, result = fused(MLP, (1, 2), size=1.0)
    again = fuse(parents, MLP.inputs, progress=False, repair=NoRepair())
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in result.state_dict().items())
    with pytest.raises(UsageError, match=r"size is 2\.1"):
        fuse(parents, MLP.inputs, size=2.1)


@pytest.mark.parametrize("size", [1.3, 2.0])
def test_repairs_that_compare_with_the_parents_know_who_has_which_unit(size):
    parents = [MLP.model(seed) for seed in (1, 2)]
    x = torch.randn(400, 6, dtype=torch.float64)
    result = fuse(parents, x[:1], size=size, data=x, repair=weldnet.Rescale(), progress=False)
    own, wanted = result.model[0](x).std(0), torch.zeros(result.model[0].out_features, dtype=torch.float64)
    count = torch.zeros_like(wanted)
    for name, parent in zip("ab", parents, strict=True):
        targets = targets_of(result.alignment[name]["0"])
        wanted[targets] += parent[0](x).std(0)
        count[targets] += 1
    torch.testing.assert_close(own, wanted / count, rtol=1e-5, atol=1e-8)
