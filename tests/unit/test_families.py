"""The survey of architectures: what works is found working, what cannot is refused for its reason."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from ssd_ray.cli import app
from ssd_ray.errors import ConfigError
from ssd_ray.models.families import document, survey, try_family
from tests import families
from tests.support.tiny import FAMILIES, RECURRENT

DIFFERENT = ("llama", "lfm2")


@pytest.mark.parametrize(
    "name",
    [name if name in DIFFERENT else pytest.param(name, marks=pytest.mark.slow) for name in (*FAMILIES, *RECURRENT)],
)
def test_families_that_are_tested_are_found(name: str) -> None:
    family = try_family(name)
    assert (family.verdict, family.reason) == ("works", "")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("rwkv", "recurrent state"),
        ("bart", "encoder-decoder"),
        ("bert", "does not take positions and mask"),
        ("deepseek_v32", "indexed_attention"),
    ],
)
def test_what_cannot_work_is_refused(name: str, reason: str) -> None:
    family = try_family(name)
    assert family.verdict == "refused"
    assert reason in family.reason


def test_what_has_no_small_model_is_not_judged() -> None:
    family = try_family("llama4")
    assert family.verdict == "unknown"
    assert "no small model of it can be made" in family.reason


def test_as_a_page() -> None:
    page = document(list(survey(["llama", "rwkv"])))
    assert "(1)\n\n`llama`" in page
    assert "- `rwkv`: their recurrent state is kept where it cannot be rolled back" in page


def test_by_the_command() -> None:
    result = CliRunner().invoke(app, ["models", "llama"])
    assert (result.exit_code, result.output.split()) == (0, ["llama", "works"])
    with pytest.raises(ConfigError, match="name: expected a causal language model of transformers, got 'nothing'"):
        list(survey(["nothing"]))


def test_the_table_of_families_has_a_cell_for_each_test() -> None:
    files = "tests/integration/test_families.py", "tests/real/test_real_models.py"
    ids = {
        f"{files[0]}::test_ar_writes_what_transformers_writes[lfm2]": ("lfm2", "ar"),
        f"{files[0]}::test_sd_and_ssd_write_what_ar_writes[gpt_oss-ssd]": ("gpt_oss", "ssd"),
        f"{files[0]}::test_sd_and_ssd_write_what_ar_writes[ssd-gpt_oss]": ("gpt_oss", "ssd"),
        f"{files[1]}::test_texts_are_those_of_transformers[Qwen-2.5-sd]": ("Qwen-2.5", "sd"),
        "tests/unit/test_families.py::test_by_the_command": None,
    }
    assert {nodeid: families.place(nodeid) for nodeid in ids} == ids
    cells = {("lfm2", "ar"): "yes", ("mistral", "ssd"): "**no**"}
    page = families.document(cells, "today")
    assert families.read(page) == cells
    assert "| `lfm2` |  | yes |  |  |  |  |\n| `mistral` |  |  |  | **no** |  |  |\n" in page
