"""Which environments mean several hosts, and what one host alone does; several real processes are in multiprocess/."""

import http.server
import threading

import pytest

from jaxtune import hosts

JAX = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.fixture
def joined(monkeypatch):
    """The arguments that jax.distributed was started with."""
    calls: list[tuple] = []
    monkeypatch.setattr(hosts.jax.distributed, "initialize", lambda *words, **more: calls.append(words))
    return calls


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (JAX, [("10.0.0.1:1234", 4, 3)]),
        ({**JAX, "SLURM_STEP_NUM_TASKS": "8"}, [("10.0.0.1:1234", 4, 3)]),
        ({**JAX, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, []),
        ({"SLURM_STEP_NUM_TASKS": "8"}, [()]),
        ({"SLURM_STEP_NUM_TASKS": "1"}, []),
        ({"SLURM_NTASKS": "8"}, []),  # inside sbatch, but not started by srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, [()]),
        ({"MEGASCALE_NUM_SLICES": "2", "TPU_WORKER_HOSTNAMES": "localhost"}, [()]),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, [()]),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, []),
        ({"TPU_WORKER_HOSTNAMES": "WARNING: could not determine TPU worker hostnames, please set it"}, []),
        ({}, []),
    ],
)
def test_who_is_joined_is_read_from_the_environment(joined, env, words):
    hosts.start(env)
    assert joined == words


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"JAX_PROCESS_ID": "0"}, "not JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"),
        ({**JAX, "JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4"),
        ({**JAX, "JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES=four"),
        ({**JAX, "JAX_COORDINATOR_ADDRESS": ""}, "not JAX_COORDINATOR_ADDRESS"),
    ],
)
def test_half_an_environment_is_refused(joined, env, message):
    with pytest.raises(ValueError, match=message):
        hosts.start(env)
    assert not joined


@pytest.mark.parametrize(("workers", "several"), [("t0:0:10.0.0.1,t1:1:10.0.0.2", True), ("t0:0:10.0.0.1", False)])
def test_a_tpu_vm_asks_its_metadata_server(monkeypatch, workers, several):
    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path.endswith("/instance/attributes/worker-network-endpoints")
            self.send_response(200 if found and self.headers["Metadata-Flavor"] == "Google" else 404)
            self.end_headers()
            self.wfile.write(workers.encode())

        def log_message(self, *words: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(hosts, "has_chips", lambda: True)
        env = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
        assert hosts.is_cluster(env) is several
        assert not hosts.is_cluster({**env, "TPU_SKIP_MDS_QUERY": "1"})
        server.shutdown()
    assert not hosts.is_cluster(env)  # nobody answers


def test_one_host_alone():
    assert hosts.gather({"a": 1}) == [{"a": 1}] and hosts.from_first("x") == "x"
    hosts.wait_for_all("nobody")
    hosts.refuse_differences({"a": {"b": 1}, "c": []})
    with pytest.raises(OSError, match="disk"), hosts.together():
        raise OSError("disk")


def test_differences_name_key_hosts_and_values(monkeypatch):
    told = [{"seed": 1, "mesh": {"fsdp": -1}}, {"seed": 1, "mesh": {"fsdp": 2}}, {"seed": 1, "mesh": {"fsdp": -1}}]
    monkeypatch.setattr(hosts, "gather", lambda value: told)
    monkeypatch.setattr(hosts, "names", lambda: ("host 0 (a)", "host 1 (b)", "host 2 (c)"))
    with pytest.raises(ValueError, match=r"disagree on mesh\.fsdp: host 1 \(b\) has 2, the other 2 have -1"):
        hosts.refuse_differences(told[0])
