"""The files of cluster/manifests: each is what the program that reads it takes, and asks for what there is here."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from jsonschema import Draft202012Validator
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from ssd_ray.cli import app
from ssd_ray.cluster import serve
from ssd_ray.config import EngineConfig

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "manifests"
KUBERAY = json.loads((ROOT / "tests" / "support" / "kuberay.json").read_text())
RAY = re.search(r"^ray\S*==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
OF_KUBERAY = ["raycluster.yaml", "rayjob.yaml", "rayservice.yaml"]


def read(name):
    return yaml.safe_load((FOLDER / name).read_text())


def clusters(manifest):
    """The specs of clusters in a manifest of KubeRay."""
    spec = manifest["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def errors(manifest):
    kind = {"$ref": f"#/$defs/{manifest['kind']}", "$defs": KUBERAY["$defs"]}
    return [error.message for error in Draft202012Validator(kind).iter_errors(manifest)]


@pytest.mark.parametrize("name", OF_KUBERAY)
def test_kuberay_takes_it(name):
    assert errors(read(name)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [(("entrypoints",), "x"), (("backoffLimit",), "2"), (("rayClusterSpec", "rayVersions"), "2.60.0")],
)
def test_the_schema_can_fail(path, value):
    """KubeRay itself would pass over a field that it does not know."""
    manifest = read("rayjob.yaml")
    at = manifest["spec"]
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    assert len(errors(manifest)) == 1


@pytest.mark.parametrize("name", OF_KUBERAY)
def test_pods_have_the_image_and_their_volumes(name):
    spec = clusters(read(name))
    assert spec["rayVersion"] == RAY
    pods = [spec["headGroupSpec"]["template"]["spec"]]
    pods += [group["template"]["spec"] for group in spec.get("workerGroupSpecs", ())]
    for pod in pods:
        (container,) = pod["containers"]
        mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
        assert mounted == {volume["name"] for volume in pod.get("volumes", ())}
        assert container["image"] == "ssd-ray:latest"
        assert container["resources"]["limits"] == container["resources"]["requests"]


def test_the_image_has_the_version_of_ray_that_the_manifests_name():
    assert re.search(r"ARG RAY=([\d.]+)", (FOLDER / "Dockerfile").read_text())[1] == RAY


def test_a_job_is_a_command_of_ours():
    program, *arguments = shlex.split(read("rayjob.yaml")["spec"]["entrypoint"])
    assert program == "ssd-ray"
    group = typer.main.get_command(app)
    with group.make_context(program, arguments) as context:
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        with command.make_context(name, rest, parent=context) as made:
            assert made.params["target"] == "/models/target"


@pytest.mark.parametrize("name", ["serve.yaml", "rayservice.yaml"])
def test_serve_takes_it_and_so_does_the_engine(name):
    document = read(name)
    config = ServeDeploySchema(
        **(document if name == "serve.yaml" else yaml.safe_load(document["spec"]["serveConfigV2"]))
    )
    (application,) = config.applications
    module, function = application.import_path.split(":")
    assert (module, getattr(serve, function)) == (serve.__name__, serve.build)
    EngineConfig.from_kwargs(**application.args)
    assert [deployment.name for deployment in application.deployments] == [serve.NAME]


def test_a_replica_fits_a_worker():
    """Its target and its draft have a GPU each."""
    document = read("rayservice.yaml")
    (application,) = ServeDeploySchema(**yaml.safe_load(document["spec"]["serveConfigV2"])).applications
    bundles = serve.bundles(EngineConfig.from_kwargs(**application.args), {"CPU": 8.0, "GPU": 2.0})
    (group,) = clusters(document)["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert sum(bundle["CPU"] for bundle in bundles) <= int(limits["cpu"])
    assert sum(bundle.get("GPU", 0) for bundle in bundles) <= int(limits["nvidia.com/gpu"])


def test_ray_up_takes_it():
    config = prepare_config(read("ray-up.yaml"))
    validate_config(config)
    assert config["max_workers"] == len(config["provider"]["worker_ips"])
