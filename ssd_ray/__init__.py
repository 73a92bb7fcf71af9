"""Speculative speculative decoding on Ray.

The public names are loaded when they are first used: importing this package imports neither torch nor ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ssd_ray.heap import collector_rests

if TYPE_CHECKING:
    from ssd_ray.async_llm import AsyncLLM
    from ssd_ray.config import SamplingParams
    from ssd_ray.errors import SsdRayError
    from ssd_ray.llm import LLM
    from ssd_ray.outputs import RequestOutput
    from ssd_ray.stats import EngineStats

__version__ = "0.1.0"

# A public name goes in three places: here, in __all__, and above for type checkers.
_HOME_OF = {
    "LLM": "ssd_ray.llm",
    "AsyncLLM": "ssd_ray.async_llm",
    "EngineStats": "ssd_ray.stats",
    "RequestOutput": "ssd_ray.outputs",
    "SamplingParams": "ssd_ray.config",
    "SsdRayError": "ssd_ray.errors",
}

__all__ = ["LLM", "AsyncLLM", "EngineStats", "RequestOutput", "SamplingParams", "SsdRayError", "__version__"]


if not TYPE_CHECKING:  # a type checker would take __getattr__ to mean that every name exists

    def __getattr__(name: str) -> object:
        """Load a public name from the module that defines it (PEP 562)."""
        home = _HOME_OF.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        with collector_rests():
            value = globals()[name] = getattr(import_module(home), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
