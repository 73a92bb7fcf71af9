"""Which runner a model has."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ssd_ray.models.memory import HeadModel
from ssd_ray.models.reading import HeadRunner
from ssd_ray.models.recurrent import RecurrentRunner
from ssd_ray.models.runner import HFRunner
from ssd_ray.models.support import is_recurrent

Runner = HFRunner | RecurrentRunner


def make_runner(model: PreTrainedModel, *, compile: bool = False, **sizes: Any) -> Runner:
    """The runner that a model needs; the arguments are those of :class:`HFRunner`. Recurrent layers are not compiled.

    Raises:
        UnsupportedModelError: neither can run it.
    """
    if isinstance(model, HeadModel):
        return HeadRunner(model, **sizes)
    if is_recurrent(model.config):
        return RecurrentRunner(model, **sizes)
    return HFRunner(model, compile=compile, **sizes)
