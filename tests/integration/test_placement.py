"""Each actor has a place of its own: a GPU where there are any, else cores."""

import os

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ssd_ray import LLM, SamplingParams
from ssd_ray.cluster import placement
from ssd_ray.cluster.placement import Cores, Placer
from ssd_ray.errors import ResourceError
from tests.support.rays import own_ray


class TestCores:
    """Dealing out one machine's cores, without Ray."""

    def test_target_and_planned_drafts_share_nothing(self):
        cores = Cores(range(8), drafts=2)
        assert cores.take("target") == (0, 1, 2, 3)
        assert [cores.take("draft") for _ in range(2)] == [(4, 5), (6, 7)]

    def test_further_drafts_take_the_least_used_cores_and_give_them_back(self):
        cores = Cores(range(4), drafts=2)
        assert [cores.take("draft") for _ in range(3)] == [(2,), (3,), (2,)]
        cores.give_back((3,))
        assert cores.take("draft") == (3,)

    def test_without_drafts_the_target_has_all(self):
        assert Cores([3, 5, 7], drafts=0).take("target") == (3, 5, 7)

    def test_one_core_is_shared(self):
        cores = Cores([6], drafts=1)
        assert (cores.take("target"), cores.take("draft")) == ((6,), (6,))

    @pytest.mark.parametrize("count", range(2, 20))
    @pytest.mark.parametrize("drafts", range(1, 5))
    def test_the_targets_cores_are_its_own(self, count, drafts):
        cores = Cores(range(count), drafts)
        target = set(cores.take("target"))
        taken = [cores.take("draft") for _ in range(drafts)]
        assert all(part and target.isdisjoint(part) for part in taken)
        if count - len(target) >= drafts:
            assert len({core for part in taken for core in part}) == sum(map(len, taken))


class TestDevices:
    """Which places there are, by what Ray says of the cluster."""

    @pytest.fixture
    def cluster_has(self, monkeypatch):
        monkeypatch.setattr(placement, "_given_bundles", list)
        return lambda **resources: monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0} | resources)

    @pytest.mark.parametrize(
        ("device", "resources", "gpus"),
        [
            ("auto", {}, 0.0),
            ("auto", {"GPU": 2.0}, 1.0),
            ("auto", {"GPU": 1.0}, placement.SHARED_GPU),
            ("cuda", {"GPU": 8.0}, 1.0),
            ("cpu", {"GPU": 8.0}, 0.0),
        ],
    )
    def test_gpus_of_an_actor(self, cluster_has, device, resources, gpus):
        cluster_has(**resources)
        assert Placer(device, drafts=1)._gpus == gpus

    def test_sharing_one_gpu_is_pointed_out(self, cluster_has, caplog):
        cluster_has(GPU=1.0)
        Placer("auto", drafts=0)
        assert caplog.text == ""
        Placer("auto", drafts=1)
        assert "one GPU" in caplog.text

    def test_cuda_needs_a_gpu(self, cluster_has):
        cluster_has()
        with pytest.raises(ResourceError, match="'cuda' needs a GPU"):
            Placer("cuda", drafts=1)


@pytest.fixture(scope="class")
def gpus():
    """A Ray of the user's own, which believes in three GPUs."""
    with own_ray(num_gpus=3, num_cpus=4):
        yield


def where(place):
    """Put an actor there, and ask it which GPUs it sees."""

    class Sitter:  # local, so that its process need not import this module
        def gpus(self):
            return os.environ.get("CUDA_VISIBLE_DEVICES")

    sitter = ray.remote(Sitter).options(**place.options()).remote()
    return sitter, ray.get(sitter.gpus.remote())


@pytest.mark.ray
@pytest.mark.usefixtures("gpus")
class TestGpus:
    @pytest.mark.slow
    def test_every_actor_of_an_engine_has_its_own(self, pair):
        with LLM(*pair, num_drafts=2) as llm:
            handles = llm._engine.driver.actors
            infos = [handle.info.remote() for handle in handles.values()]
            assert sorted(entry["gpus"] for entry in ray.get(infos)) == ["0", "1", "2"]
            assert len(llm.generate("x", SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids) == 4
        assert ray.is_initialized(), "a Ray that was there before stays"

    def test_a_place_that_is_given_back_is_taken_again(self, monkeypatch):
        placer = Placer("auto", drafts=2)
        places = [placer.place(role) for role in ("target", "draft", "draft")]
        sitters = [where(place) for place in places]
        assert {gpu for _, gpu in sitters} == {"0", "1", "2"}
        assert [place.cores for place in places] == [None] * 3
        with monkeypatch.context() as patch:
            patch.setattr(placement, "PLACEMENT_SECONDS", 1.0)
            with pytest.raises(ResourceError, match="no room for the draft: it needs 1 CPU and 1 GPU, and free are 1"):
                placer.place("draft")
        placer.release(places[1])
        places[1] = placer.place("draft")
        assert where(places[1])[1] == sitters[1][1]
        for place in places:
            placer.release(place)

    def test_the_cpu_can_be_asked_for(self):
        placer = Placer("cpu", drafts=1)
        places = [placer.place("target"), placer.place("draft")]
        assert [place.options()["num_gpus"] for place in places] == [0.0, 0.0]
        assert all(set(place.cores) <= os.sched_getaffinity(0) for place in places)
        for place in places:
            placer.release(place)

    def test_a_group_that_captures_children_is_filled_first(self):
        """As in a replica of Ray Serve: bundle 0 is its own, the others are its engine's."""
        group = placement_group([{"CPU": 0.25}, {"CPU": 0.25}, {"CPU": 0.125}])
        ray.get(group.ready())

        class Replica:
            def indices(self):
                placer = Placer("cpu", drafts=1)
                places = [placer.place(role) for role in ("target", "draft", "draft")]
                placer.release(places[1])
                places.append(placer.place("draft"))
                for place in (places[0], *places[2:]):
                    placer.release(place)
                return [(place.bundle.given, place.bundle.index, place.options()["num_cpus"]) for place in places]

        def indices(capture):
            strategy = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=capture)
            replica = ray.remote(num_cpus=0.25)(Replica).options(scheduling_strategy=strategy).remote()
            found = ray.get(replica.indices.remote())
            ray.kill(replica)
            return found

        assert indices(True) == [(True, 1, 0.25), (True, 2, 0.125), (False, 0, 1.0), (True, 2, 0.125)]
        assert indices(False) == [(False, 0, 1.0)] * 4
        remove_placement_group(group)
