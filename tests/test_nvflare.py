"""The adapter for NVIDIA FLARE, where that is installed (it is no dependency)."""

from __future__ import annotations

import pytest
import torch

from weldnet.federated import Blueprint, ClientUpdate, aggregate

pytest.importorskip("nvflare")


@pytest.mark.parametrize("kind", ["arrays", "tensors", "differences"])
def test_a_round_is_the_pure_function(kind: str):
    from nvflare.app_common.abstract.fl_model import FLModel, ParamsType  # pyright: ignore[reportMissingImports]

    from weldnet.federated.nvflare import FusionAggregator

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.BatchNorm1d(6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    net.eval()
    reference, x = net.state_dict(), torch.zeros(2, 3)
    states = [
        {n: t + torch.randn(t.shape) if t.is_floating_point() else t + 7 for n, t in reference.items()}
        for _ in range(3)
    ]
    aggregator = FusionAggregator(net, x, rule="gamf")
    for number, state in enumerate(states):
        sent = {n: t - reference[n] for n, t in state.items()} if kind == "differences" else state
        params = {n: t.numpy() for n, t in sent.items()} if kind == "arrays" else sent
        meta = {"client_name": f"site-{number}", "NUM_STEPS_CURRENT_ROUND": 10 + number}
        params_type = ParamsType.DIFF if kind == "differences" else ParamsType.FULL
        aggregator.accept_model(FLModel(params_type=params_type, params=params, meta=meta))
    found = aggregator.aggregate_model()
    updates = [ClientUpdate(client=f"site-{k}", state=s, examples=10 + k) for k, s in enumerate(states)]
    expected = aggregate(updates, reference, 1, rule="gamf", blueprint=Blueprint.of(net, x)).state
    assert found.params_type == ParamsType.FULL
    for name, tensor in expected.items():
        got = torch.as_tensor(found.params[name])
        assert got.dtype == tensor.dtype
        torch.testing.assert_close(got, tensor, rtol=0, atol=1e-6 if kind == "differences" else 0)
    assert aggregator.last is not None
    assert aggregator.last.clients == ("site-0", "site-1", "site-2")
