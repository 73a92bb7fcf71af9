"""What a user installs: one top-level name, complete, quick to import."""

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from inspect import signature
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("actors", "cluster")


def git_files(*folders):
    """The committed files of these folders; whoever builds from an unpacked sdist has no git and sees what is there."""
    listing = subprocess.run(["git", "ls-files", "-z", "--", *folders], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode == 0 and listing.stdout:
        return {name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()}
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts)
    return {str(path.relative_to(ROOT)) for path in found if path.is_file()}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """(sdist, wheel built from that sdist, wheel built from the checkout)."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation"]
    subprocess.run([*build, "--outdir", out / "sdist", ROOT], check=True, capture_output=True, text=True)
    subprocess.run([*build, "--wheel", "--outdir", out / "wheel", ROOT], check=True, capture_output=True, text=True)
    (sdist,) = (out / "sdist").glob("*.tar.gz")
    (from_sdist,) = (out / "sdist").glob("*.whl")
    (from_checkout,) = (out / "wheel").glob("*.whl")
    return sdist, from_sdist, from_checkout


@pytest.fixture(scope="module")
def wheel_names(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        return wheel.namelist()


@pytest.mark.slow
def test_sdist_holds_the_linked_folders_once(archives):
    with tarfile.open(archives[0]) as sdist:
        members = sdist.getmembers()
    names = [member.name.partition("/")[2] for member in members]
    assert len(names) == len(set(names))
    assert {"README.md", "LICENSE", "pyproject.toml", *git_files(*LINKED)} <= set(names)
    assert not [name for name in names if name.startswith(("ssd_ray/actors", "ssd_ray/cluster", ".venv", ".git/"))]


@pytest.mark.slow
def test_wheel_installs_one_top_level_name(wheel_names):
    assert {name.split("/")[0] for name in wheel_names if ".dist-info/" not in name} == {"ssd_ray"}


@pytest.mark.slow
def test_wheel_holds_every_file_once(wheel_names):
    linked = {f"ssd_ray/{name}" for name in git_files(*LINKED)}
    own = {name for name in git_files("ssd_ray") if not (ROOT / name).is_symlink()}
    assert len(wheel_names) == len(set(wheel_names))
    assert "ssd_ray/actors/__init__.py" in linked
    assert "ssd_ray/py.typed" in own
    assert linked | own <= set(wheel_names)
    assert not [name for name in wheel_names if "__pycache__" in name]


@pytest.mark.slow
def test_both_ways_to_a_wheel_agree(archives, wheel_names):
    with zipfile.ZipFile(archives[2]) as wheel:
        assert sorted(wheel.namelist()) == sorted(wheel_names)


@pytest.mark.slow
def test_wheel_has_the_console_script(archives, wheel_names):
    (entry_points,) = (name for name in wheel_names if name.endswith("/entry_points.txt"))
    with zipfile.ZipFile(archives[1]) as wheel:
        assert "ssd-ray = ssd_ray.cli:main" in wheel.read(entry_points).decode()


@pytest.mark.slow
def test_unpacked_wheel_imports_its_linked_packages(archives, tmp_path):
    with zipfile.ZipFile(archives[1]) as wheel:
        wheel.extractall(tmp_path)
    script = "import ssd_ray.actors as a, ssd_ray.cluster as c; print(a.__file__); print(c.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [Path(line).parent for line in run.stdout.split()] == [tmp_path / "ssd_ray" / name for name in LINKED]


def test_importing_brings_nothing_heavy():
    """So it takes tens of milliseconds."""
    script = "import json, sys, ssd_ray; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(json.loads(run.stdout)).isdisjoint({"torch", "ray", "numpy", "transformers", "msgspec", "zmq"})


@pytest.mark.parametrize("name", LINKED)
def test_links_are_relative(name):
    """A link with an absolute target would break in every other checkout."""
    link = ROOT / "ssd_ray" / name
    if not link.is_symlink():
        pytest.skip("not a checkout")
    assert os.readlink(link) == f"../{name}"


def test_a_job_ships_the_library_and_little_else(tmp_path):
    """What `ray job submit --working-dir .` packs: the linked packages as files, neither tests nor environments."""
    from ray._private.runtime_env.packaging import create_package  # no public function packs without a cluster

    # Older ones of Ray know .gitignore alone, and ship the tests, too.
    heeds_rayignore = "include_gitignore" in signature(create_package).parameters
    options = {"include_gitignore": True} if heeds_rayignore else {}
    create_package(str(ROOT), tmp_path / "package.zip", excludes=[], **options)
    with zipfile.ZipFile(tmp_path / "package.zip") as package:
        names = set(package.namelist())
        size = sum(entry.compress_size for entry in package.infolist())
    assert {f"ssd_ray/{name}" for name in git_files(*LINKED)} <= names
    ignored = (".git/", ".venv/", "dist/", *(["tests/"] if heeds_rayignore else []))
    assert not [name for name in names if name.startswith(ignored)]
    assert size < 250 * 2**20  # Ray refuses more than 500 MiB


@pytest.mark.parametrize("name", ["README.md", "docs/operations.md", "examples/job.py"])
def test_where_a_job_is_submitted_the_token_is_named(name):
    lines = re.findall(r"^.*ray job submit .*examples/job\.py.*$", (ROOT / name).read_text(), re.MULTILINE)
    assert lines
    assert all(line.strip().startswith("RAY_AUTH_MODE=token ray job submit ") for line in lines)
