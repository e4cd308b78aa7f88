"""Whole runs with Flower's own programs: minutes, so they run on demand, with ``make test-federated``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from federations import BASE, rounds, same
from weldnet.federated import FederatedConfig, simulate
from weldnet.federated.flower import Certificates, Deployment, Plan, federate
from weldnet.federated.flower._keys import write_key

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")]

SMALL = {**BASE, "clients": 2, "rounds": 3, "algorithm": "moon", "local": {"epochs": 2, "batch_size": 16, "lr": 0.1}}
MNIST = {
    "dataset": "mnist",
    "train_limit": 6000,
    "model": "mlp",
    "model_options": {"sizes": [784, 100, 10]},
    "clients": 5,
    "rounds": 3,
}


_STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    yield
    while _STARTED:
        _STARTED.pop().kill()
    until(lambda: not programs(tmp_path), 30)


def programs(folder: Path, *words: str) -> dict[int, str]:
    """Return Flower's processes whose home lies in a folder, by number, with their command lines."""
    found: dict[int, str] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            home = f"FLWR_HOME={folder}".encode()
            if any(word.startswith(home) for word in (entry / "environ").read_bytes().split(b"\0")):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if command and all(word in command for word in words) and int(entry.name) != os.getpid():
                    found[int(entry.name)] = command
        except OSError:
            continue
    return found


def until(done: Callable[[], Any], seconds: float = 900) -> Any:
    end = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


def command(tmp_path: Path, config: dict[str, Any], *words: str, out: str = "run") -> subprocess.Popen[str]:
    path = tmp_path / "job.yaml"
    path.write_text(FederatedConfig.make(config).to_yaml())
    line = [*command_line("federate"), path, "-o", tmp_path / out, *words]
    _STARTED.append(subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    return _STARTED[-1]


def ended(running: subprocess.Popen[str], seconds: float = 900) -> str:
    """Wait for a command that must end well; return what it said."""
    said, _ = running.communicate(timeout=seconds)
    assert running.returncode == 0, said
    return said


@pytest.mark.data
def test_three_engines_give_the_same_weights(tmp_path: Path):
    ended(command(tmp_path, MNIST, out="local"))
    ended(command(tmp_path, MNIST, "--nodes", "2", out="two"))
    ended(command(tmp_path, MNIST, "--engine", "ray", out="ray"))
    ended(command(tmp_path, MNIST, "--engine", "superlink", "--nodes", "2", out="superlink"))
    # A client that fell out on a busy machine shows here, and not as weights that differ.
    replies = {out: [r.values["replies"] for r in rounds(tmp_path / out)] for out in ("ray", "superlink")}
    assert replies == {"ray": [5, 5, 5], "superlink": [2, 2, 2]}
    assert same(tmp_path / "local", tmp_path / "ray")
    assert same(tmp_path / "two", tmp_path / "superlink")


def test_rays_workers_have_the_commands_priority(tmp_path: Path):
    """And so they do not starve on a busy machine; their object store is bounded."""
    running = command(tmp_path, {**SMALL, "rounds": 1}, "--engine", "ray")
    (worker, *_) = until(lambda: programs(tmp_path, "ray::"))
    assert os.getpriority(os.PRIO_PROCESS, worker) == os.getpriority(os.PRIO_PROCESS, 0)
    (raylet, *_) = programs(tmp_path, "--object_store_memory=").values()
    assert int(raylet.split("--object_store_memory=")[1].split()[0]) <= 1 << 30
    ended(running)


def test_a_supernode_that_is_killed_in_a_round_does_not_end_the_run(tmp_path: Path):
    running = command(tmp_path, {**SMALL, "rounds": 4}, "--engine", "superlink")
    out = tmp_path / "run"
    until(lambda: rounds(out))
    until(lambda: programs(tmp_path, "flwr-clientapp"))
    (node,) = programs(tmp_path, "flower-supernode", "partition-id=1")
    os.kill(node, signal.SIGKILL)
    assert "supernode-1 ended (signal 9)" in ended(running)
    found = rounds(out)
    assert [record.cell["round"] for record in found] == [1, 2, 3, 4]
    assert all("client-00" in record.extra["clients"] for record in found)
    assert "client-01" in found[-1].extra["clients"]
    assert any("client-01" not in record.extra["clients"] for record in found)


def test_a_server_that_is_killed_goes_on_bit_for_bit(tmp_path: Path):
    running = command(tmp_path, SMALL, "--engine", "superlink")
    until(lambda: rounds(tmp_path / "run"))
    running.kill()
    running.communicate()
    until(lambda: not programs(tmp_path), 30)
    ended(command(tmp_path, SMALL, "--engine", "superlink", "--resume", "--json"))
    assert [record.cell["round"] for record in rounds(tmp_path / "run")] == [1, 2, 3]
    simulate(FederatedConfig.make(SMALL), tmp_path / "plain")
    assert same(tmp_path / "plain", tmp_path / "run")


def test_a_run_that_fails_inside_flower_ends_with_its_reason(tmp_path: Path):
    running = command(tmp_path, {**SMALL, "dataset": str(tmp_path / "nothing")}, "--engine", "superlink")
    said, _ = running.communicate(timeout=600)
    assert running.returncode == 1
    last = said.strip().splitlines()[-1]
    assert "finished:failed" in last
    assert str(tmp_path / "nothing") in last


def test_tls_and_keys_let_only_known_supernodes_in(tmp_path: Path):
    make_certificates(tmp_path / "certificates")
    certificates = Certificates(tmp_path / "certificates")
    config = FederatedConfig.make({**SMALL, "rounds": 1})
    with Deployment(
        tmp_path / "flower",
        [{"partition-id": k, "num-partitions": 2} for k in range(2)],
        certificates=certificates,
        authenticate=True,
    ) as deployment:
        write_key(tmp_path / "stranger")
        stranger = deployment.node_command({"partition-id": 1}, tmp_path / "stranger")
        unregistered = deployment.programs.start("stranger", stranger)
        nameless = deployment.programs.start("nameless", deployment.node_command({"partition-id": 1}))
        plain = [word for word in stranger if word != str(certificates.authority)]
        plain[plain.index("--root-certificates")] = "--insecure"
        unencrypted = deployment.programs.start("unencrypted", plain)
        plan = Plan(engine="superlink", join=deployment.address, certificates=tmp_path / "certificates")
        federate(config, tmp_path / "run", plan)
        assert "[code: 2004] Failed to activate SuperNode" in unregistered.log.read_text()
        assert "SuperNode authentication is enabled" in nameless.log.read_text()
        assert not unregistered.running
        assert not nameless.running
        assert "SuperNode ID" not in unencrypted.log.read_text()
    (record,) = rounds(tmp_path / "run")
    assert record.extra["clients"] == ["client-00", "client-01"]
    simulate(config, tmp_path / "plain")
    assert same(tmp_path / "plain", tmp_path / "run")


def make_certificates(folder: Path) -> None:
    """Make an authority and a server's certificate, as docs/federated.md does."""
    folder.mkdir()

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    (folder / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    new = ("-newkey", "rsa:2048", "-nodes")
    openssl("req", "-x509", *new, "-days", "2", "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=test")
    openssl("req", *new, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost")
    signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
    openssl("x509", "-req", "-in", "server.csr", *signed, "-out", "server.pem")


def test_flwr_run_takes_the_app_folder(tmp_path: Path):
    app = subprocess.run(
        [*command_line("federate"), written(tmp_path), "-o", tmp_path / "run", "--write-app", tmp_path / "app"]
    )
    assert app.returncode == 0
    with Deployment(tmp_path / "flower", [{"partition-id": k} for k in range(2)]) as deployment:
        number = deployment.flwr.run(tmp_path / "app", {"federated.rounds": 1})
        found = until(lambda: (run := deployment.flwr.show(number)).finished and run)
    assert found.completed, found
    assert [record.cell["round"] for record in rounds(tmp_path / "run")] == [1]


def written(tmp_path: Path) -> Path:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(SMALL))
    return path


def command_line(name: str) -> list[str]:
    return [str(Path(sys.executable).parent / "weldnet"), name]
