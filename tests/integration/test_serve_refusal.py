"""Why a server does not start is said in the words of whoever refused, and at once."""

import re

import pytest
import ray

from ssd_ray.cluster.serve import serving
from ssd_ray.config import EngineConfig
from ssd_ray.errors import ModelError
from tests.support.processes import free_port
from tests.support.tiny import with_weights


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_replicas_error_reaches_whoever_started_it_and_is_not_tried_again(cluster, pair, tmp_path):
    """Of a draft that passes the checks but cannot be loaded."""
    with_weights(pair[1], tmp_path, {"model.norm.weight": None})
    config = EngineConfig(target=pair[0], draft=str(tmp_path))
    before = set(ray.util.placement_group_table())  # other tests had replicas on this Ray, too
    with pytest.raises(ModelError) as caught, serving(config, "127.0.0.1", free_port()):
        pass
    assert re.match(r"draft: .* lacks weights that the model has: model\.norm\.weight", str(caught.value))
    groups = {name: group for name, group in ray.util.placement_group_table().items() if name not in before}
    assert sum(len(group["bundles"]) == 3 for group in groups.values()) == 1
