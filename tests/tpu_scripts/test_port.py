import socket
import threading

import pytest

from tests.tpu_scripts.test_scripts import SCRIPTS, load


@pytest.fixture
def port(monkeypatch):
    module = load(SCRIPTS / "on_worker/port.py")
    monkeypatch.setattr(module, "SECONDS", 1.0)
    return module


@pytest.fixture
def free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_all_workers_reach_process_0(port, free):
    said = []
    listener = threading.Thread(target=lambda: said.append(port.listen(free, 2)))
    listener.start()
    assert [port.call("127.0.0.1", free) for _ in range(2)] == ["", ""]
    listener.join()
    assert said == [""]
    socket.create_server(("", free)).close()  # and the port is free again


def test_a_shut_or_taken_port_is_named_with_what_to_do(port, free):
    assert f"cannot reach process 0 at 127.0.0.1:{free}" in port.call("127.0.0.1", free)
    assert f"called by 0 of 3 workers on port {free}" in port.listen(free, 3)
    with socket.create_server(("", free)):
        assert f"cannot listen on port {free}" in port.listen(free, 3)


@pytest.mark.parametrize(
    ("endpoints", "environment", "number", "expected"),
    [
        ("t1v-w-0,t1v-w-1", "WORKER_ID: '0'\n", "0", ("t1v-w-0", True)),
        ("unknown:1:10.0.0.2,unknown:2:10.0.0.3", "WORKER_ID: '1'\n", "1", ("10.0.0.2", False)),
        ("a,b", "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.9:8080'\nMEGASCALE_SLICE_ID: '1'\n", "0", ("10.0.0.9", False)),
        ("a,b", "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.9:8080'\nMEGASCALE_SLICE_ID: '0'\n", "0", ("10.0.0.9", True)),
    ],
)
def test_process_0_is_where_jax_looks_for_it(port, monkeypatch, endpoints, environment, number, expected):
    cluster = pytest.importorskip("jax._src.clusters.cloud_tpu_cluster")
    values = {"worker-network-endpoints": endpoints, "tpu-env": environment, "agent-worker-number": number}
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    monkeypatch.setattr(port, "metadata", values.__getitem__)
    assert port.coordinator() == expected
    monkeypatch.setattr(cluster, "get_metadata", lambda key: (values[key], 200))
    monkeypatch.setattr(cluster.GceTpuCluster, "wait_for_coordinator", lambda *_: None)
    assert cluster.GceTpuCluster.get_coordinator_address(1, "8476") == f"{expected[0]}:8476"
    assert (cluster.GceTpuCluster.get_process_id() == 0) == expected[1]
