"""Which Ray an engine finds: one that does not answer is told from one that does at once, without starting anything."""

import logging
import socket
from types import SimpleNamespace

import pytest
import ray

from ssd_ray.cluster import runtime
from ssd_ray.cluster.runtime import RayRuntime, require_cluster
from ssd_ray.cluster.serve import build
from ssd_ray.errors import EngineError, ResourceError


@pytest.fixture
def silent():
    """The address of a cluster that is gone: nobody listens there, nor will somebody else."""
    with socket.socket() as holder:
        holder.bind(("", 0))  # Ray asks for its address in the network instead of 127.0.0.1
        yield f"127.0.0.1:{holder.getsockname()[1]}"


@pytest.fixture(autouse=True)
def ray_is_not_asked(monkeypatch):
    def init(**_):
        raise AssertionError("Ray was asked, which tries for minutes")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def record(monkeypatch, tmp_path):
    """Ray's record of the latest cluster that was started on this machine."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray" / "ray_current_cluster"


@pytest.mark.parametrize("prefix", ["", "ray://"])
def test_a_cluster_that_the_environment_names_and_that_is_gone(monkeypatch, silent, prefix):
    monkeypatch.setenv("RAY_ADDRESS", prefix + silent)
    with pytest.raises(ResourceError, match=rf"no Ray cluster answers at {prefix}{silent} \(RAY_ADDRESS\): .*refused"):
        RayRuntime()


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:99999999", "ray://"])
def test_an_address_that_is_none(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ResourceError, match=rf"no Ray cluster answers at {address} \(RAY_ADDRESS\): "):
        RayRuntime()


def test_a_server_is_not_built_for_a_cluster_of_which_only_the_record_is_left(record, silent):
    record.write_text(silent)
    with pytest.raises(ResourceError, match=r"no Ray cluster answers at .*, where the latest .* was: .*refused"):
        build({})


def test_a_cluster_that_answers_or_none_at_all_is_fine(record):
    require_cluster()
    with socket.create_server(("", 0)) as listener:
        record.write_text(f"127.0.0.1:{listener.getsockname()[1]}")
        require_cluster()


class TestPrivate:
    """A private Ray of a busy machine."""

    @pytest.fixture(autouse=True)
    def without_processes(self, monkeypatch):
        monkeypatch.setattr(runtime, "_next_kind", lambda: "private")
        monkeypatch.setattr(ray, "shutdown", lambda: None)

    @staticmethod
    def starts(monkeypatch, *outcomes):
        """Let Ray start with these outcomes, one after the other; the folders that were tried."""
        folders, left = [], list(outcomes)

        def start(folder):
            folders.append(folder)
            if (outcome := left.pop(0)) is not None:
                raise outcome

        monkeypatch.setattr(runtime, "_start_ray", start)
        return folders

    def test_it_is_started_again_if_its_processes_were_late(self, monkeypatch, caplog):
        folders = self.starts(monkeypatch, Exception("The current node timed out during startup."), None)
        RayRuntime().close()
        assert len(set(folders)) == 2
        assert "Trying once more" in caplog.text

    @pytest.mark.parametrize(
        ("outcomes", "tries"), [([ValueError("no")], 1), ([Exception("timed out"), Exception("timed out")], 2)]
    )
    def test_what_cannot_succeed_is_not_tried_again(self, monkeypatch, outcomes, tries):
        folders = self.starts(monkeypatch, *outcomes)
        with pytest.raises(EngineError, match=f"Ray does not start: {outcomes[-1]}"):
            RayRuntime()
        assert len(folders) == tries

    def test_where_the_logs_are_is_said(self, monkeypatch, caplog):
        self.starts(monkeypatch, None)
        node = SimpleNamespace(get_logs_dir_path=lambda: "/tmp/ray/session/logs")
        monkeypatch.setattr(ray._private.worker, "_global_node", node)
        with caplog.at_level(logging.INFO, "ssd_ray"):
            RayRuntime().close()
        assert "the logs of Ray and of its actors on this machine are in /tmp/ray/session/logs" in caplog.text
