"""Errors that have come as text are themselves again."""

import traceback

import pytest

from ssd_ray import errors
from ssd_ray.errors import ConfigError, ModelError, SsdRayError, UnsupportedModelError, quoted_error

EVERY = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, SsdRayError)]


def formatted(error):
    """As Ray Serve keeps it: the traceback of an error that was raised while another was handled."""
    try:
        try:
            raise ModelError("draft: another one")
        except ModelError as cause:
            raise error from cause
    except SsdRayError:
        return f"The deployment failed to start 1 times in a row. Error:\n{traceback.format_exc()}\n"


@pytest.mark.parametrize("kind", EVERY)
def test_an_error_has_its_class_and_words_again(kind):
    error = ConfigError("dtype", "a type", "x") if kind is ConfigError else kind("target: no such thing\nin there")
    quoted = quoted_error(formatted(error))
    assert type(quoted) is kind
    assert str(quoted) == str(error)


def test_colours_and_prefixes_do_not_matter():
    text = "\x1b[36mray::ServeReplica()\x1b[39m\n  ssd_ray.errors.UnsupportedModelError: why\n\nmore"
    quoted = quoted_error(text)
    assert (type(quoted), str(quoted)) == (UnsupportedModelError, "why")


@pytest.mark.parametrize("text", ["", "ValueError: why", "in ssd_ray.errors.py: line 3"])
def test_a_text_without_one(text):
    assert quoted_error(text) is None


def test_an_error_of_a_newer_version_is_one_of_ours():
    assert type(quoted_error("ssd_ray.errors.NoSuchError: why")) is SsdRayError
