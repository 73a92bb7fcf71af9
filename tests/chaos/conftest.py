"""The same Ray as for the integration tests."""

from tests.integration.conftest import cluster

__all__ = ["cluster"]
