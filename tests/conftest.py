"""What every test shares: an environment without network, without surprises from Ray, and with one thread for maths."""

import atexit
import gc
import logging
import os
import shutil
import signal
import sys
import tempfile

import pytest
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

settings.register_profile("patient", deadline=None, max_examples=30)  # machines are noisy, and tests do not measure
settings.load_profile("patient")

# A Ray that somebody left on this machine, or the record of one, is not for tests to find.
for name in [name for name in os.environ if name.startswith("RAY_")]:
    del os.environ[name]
os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ssd-", dir="/tmp")  # short: Ray's sockets lie there
atexit.register(shutil.rmtree, os.environ["RAY_TMPDIR"], ignore_errors=True)

# Before anything imports torch, transformers or ray: they read these once.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
)
if "PYTEST_XDIST_WORKER" not in os.environ:  # what is measured is kept for the run; its workers and engines share it
    os.environ["SSD_RAY_CACHE"] = tempfile.mkdtemp(prefix="ssd-ray-tests-")
    atexit.register(shutil.rmtree, os.environ["SSD_RAY_CACHE"], ignore_errors=True)
for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):
    os.environ.pop(name, None)  # typer colours its help for any of them, whatever their value

# A shell starts background jobs with SIGINT ignored, and Python then leaves it so: tests of Ctrl-C want it back.
signal.signal(signal.SIGINT, signal.default_int_handler)


# What is imported and collected stays; looking through it over and over takes a fifth of the time of collecting it.
gc.disable()


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


SIDE_BY_SIDE = (
    "tests/unit/",
    "tests/property/",
    "tests/conformance/test_runner_contract.py",
    "tests/integration/test_bad_input.py",
    "tests/integration/test_batch_texts.py",
    "tests/integration/test_devices.py",
    "tests/integration/test_exactness.py",
    "tests/integration/test_experience.py",
    "tests/integration/test_families.py",
    "tests/integration/test_other_vocabularies.py",
)
"""Where nothing but threads is started."""


APART = ("tests/integration/test_job.py", "tests/integration/test_serve.py", "tests/integration/test_serve_command.py")
"""Systems in processes and folders of their own, which are told from others by a mark: one of them may run beside
another whole system."""


class WholeSystemsTakeTurns(LoadFileScheduling):
    """Files side by side, but one after the other where they start processes: an engine fills a machine's cores."""

    def _split_scope(self, nodeid):
        file = super()._split_scope(nodeid)
        if nodeid.startswith(APART):
            return "systems apart"
        return file if nodeid.startswith(SIDE_BY_SIDE) else "whole systems"


def pytest_xdist_make_scheduler(config, log):
    return WholeSystemsTakeTurns(config, log)


def pytest_collection_modifyitems(items):
    """Who shares a Ray comes first."""
    items.sort(key=lambda item: "cluster" not in item.fixturenames)


@pytest.fixture(scope="module")
def cluster():
    """A private Ray; engines that are made while it is there take it as given. It is there for all tests that ask for
    it, one after the other."""
    from tests.support.rays import SHARED

    return SHARED.runtime()


def end_shared_ray():
    if "tests.support.rays" in sys.modules:
        sys.modules["tests.support.rays"].SHARED.end()


def pytest_sessionfinish():
    end_shared_ray()


@pytest.fixture(autouse=True)
def library_logger():
    """The library's logger is as it was after a test: commands log to the standard error that they find."""
    logger = logging.getLogger("ssd_ray")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers = handlers
    logger.setLevel(level)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """A test that does not ask for the shared Ray finds none; one marked gpu skips on a machine without one."""
    if "cluster" not in item.fixturenames:
        end_shared_ray()
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
