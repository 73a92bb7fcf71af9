"""Files of prompts and of results: read as needed, written once, resumed wherever they were cut."""

import json
import os
import tracemalloc
from dataclasses import replace
from itertools import islice

import pytest

from ssd_ray.config import EngineConfig, SamplingParams
from ssd_ray.errors import ConfigError
from ssd_ray.prompt_files import ResultFile, count_prompts, read_prompts

PARAMS = SamplingParams(max_tokens=8, seed=4)
CONFIG = EngineConfig(num_drafts=1)
PROMPTS = ["one", "two", "drei \N{SNOWMAN}", "four"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return path


def run(prompts, output, *, params=PARAMS, config=CONFIG, stop_after=None):
    """Write a made-up result for each prompt that has none; how many there were."""
    with ResultFile(output, read_prompts(prompts, params), config) as results:
        for item in islice(results.left, stop_after):
            results.write(item, {"prompt": item.prompt, "text": item.prompt.upper()})
        return results.done


def test_results_are_in_order_and_numbered(prompts, tmp_path):
    output = tmp_path / "results.jsonl"
    assert run(prompts, output) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["index"], line["prompt"], line["text"]) for line in lines] == [
        (index, prompt, prompt.upper()) for index, prompt in enumerate(PROMPTS)
    ]


def test_a_result_is_in_the_file_as_soon_as_it_is_written(prompts, tmp_path):
    output = tmp_path / "results.jsonl"
    with ResultFile(output, read_prompts(prompts, PARAMS), CONFIG) as results:
        results.write(next(results.left), {"text": "x"})
        assert json.loads(output.read_text())["text"] == "x"


def test_wherever_a_run_is_cut_the_next_one_completes_the_same_file(prompts, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    run(prompts, whole)
    expected = whole.read_bytes()
    for length in range(len(expected) + 1):
        cut.write_bytes(expected[:length])
        assert run(prompts, cut) == expected[:length].count(b"\n")
        assert cut.read_bytes() == expected


def test_a_file_that_grows_is_gone_on_with(prompts, tmp_path):
    output = tmp_path / "results.jsonl"
    run(prompts, output)
    with prompts.open("a") as file:
        file.write("five\n")
    assert run(prompts, output) == 4
    assert json.loads(output.read_text().splitlines()[-1])["prompt"] == "five"


def test_what_does_not_change_texts_may_change(prompts, tmp_path):
    output = tmp_path / "results.jsonl"
    run(prompts, output, stop_after=2)
    assert run(prompts, output, config=replace(CONFIG, num_drafts=3, method="sd", max_num_seqs=2)) == 2


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda prompts: {"params": replace(PARAMS, seed=5)},
        lambda prompts: {"params": replace(PARAMS, temperature=0.5)},
        lambda prompts: {"config": replace(CONFIG, target="another")},
        lambda prompts: prompts.write_text("eins\ntwo\n") and {},
        lambda prompts: (prompts.write_text("") and None) or {},
    ],
)
def test_results_of_something_else_are_refused_and_left_alone(prompts, tmp_path, change, whole):
    output = tmp_path / "results.jsonl"
    run(prompts, output, stop_after=1)
    if not whole:
        os.truncate(output, output.stat().st_size - 1)
    before = output.read_bytes()
    with pytest.raises(ConfigError, match="output: expected results of the same prompts and parameters"):
        run(prompts, output, **change(prompts))
    assert output.read_bytes() == before


@pytest.mark.parametrize("content", ["a diary", "a diary\n", "{}", '{"index": 0}\n', "\n"])
def test_another_file_is_refused_and_left_alone(prompts, tmp_path, content):
    output = tmp_path / "diary.txt"
    output.write_text(content)
    with pytest.raises(ConfigError, match="output"):
        run(prompts, output)
    assert output.read_text() == content


def test_a_folder_is_no_file(prompts, tmp_path):
    with pytest.raises(ConfigError, match="output: expected a file"):
        run(prompts, tmp_path)


@pytest.mark.parametrize("name", ["prompts.txt", pytest.param("prompts.jsonl", marks=pytest.mark.slow)])
def test_any_number_of_lines_fits_into_little_memory(tmp_path, name):
    prompts, output = tmp_path / name, tmp_path / "results.jsonl"
    line = json.dumps("x" * 1000) + "\n"
    with prompts.open("w") as file:
        file.writelines(line for _ in range(1_200))
    tracemalloc.start()
    try:
        assert count_prompts(prompts, PARAMS) == 1_200
        run(prompts, output)
        assert run(prompts, output) == 1_200
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20 < prompts.stat().st_size


def test_a_pipe_is_read_once(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert count_prompts(pipe, PARAMS) is None


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_a_file_of_prompts_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="prompt_file: expected a text file"):
        count_prompts(path, PARAMS)


ENTRIES = ["one", {"prompt": "two", "seed": 5}, "\N{SNOWMAN}"]
ITEMS = [("one", PARAMS), ("two", replace(PARAMS, seed=5)), ("\N{SNOWMAN}", PARAMS)]


@pytest.mark.parametrize("name", ["x.jsonl", "x.JSONL", "x.json", "x.Json"])
@pytest.mark.parametrize(
    "text",
    [
        "\n".join(map(json.dumps, ENTRIES)),
        "\r\n\r\n".join(map(json.dumps, ENTRIES)),
        json.dumps(ENTRIES),
        "\n  " + json.dumps(ENTRIES, indent=2) + "\n\n",
        json.dumps(ENTRIES, ensure_ascii=False, indent=0),
    ],
    ids=["lines", "sparse lines", "an array", "an indented array", "as text"],
)
@pytest.mark.parametrize("mark", ["", "\N{BYTE ORDER MARK}"], ids=["", "mark"])
def test_json_files(tmp_path, name, text, mark):
    path = tmp_path / name
    path.write_text(mark + text, encoding="utf-8", newline="")
    assert [(item.index, item.prompt, item.params) for item in read_prompts(path, PARAMS)] == [
        (index, *item) for index, item in enumerate(ITEMS)
    ]


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\n[2]\n", encoding="utf-8-sig")
    assert [item.prompt for item in read_prompts(path, PARAMS)] == ["one", "[2]"]


@pytest.mark.parametrize("text", ["[", "[1]", '["x"', '["x"] y', "[[]]", '["x", null]', "[" * 100_000, "3", "{}"])
def test_what_is_no_array_of_prompts(tmp_path, text):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"^prompt_file: expected") as caught:
        count_prompts(path, PARAMS)
    assert len(str(caught.value)) < 500


def test_an_empty_file_of_json_has_no_prompts(tmp_path):
    for text in ("", "[]", "\n"):
        (tmp_path / "x.json").write_text(text)
        assert count_prompts(tmp_path / "x.json", PARAMS) == 0


def test_errors_are_counted_also_those_of_an_earlier_run(prompts, tmp_path):
    output = tmp_path / "results.jsonl"
    with ResultFile(output, read_prompts(prompts, PARAMS), CONFIG) as results:
        results.write(next(results.left), {"error": "too long", "prompt": "one"})
        results.write(next(results.left), {"prompt": "two", "text": '"error": "x"'})
        assert results.failed == 1
    with ResultFile(output, read_prompts(prompts, PARAMS), CONFIG) as results:
        assert (results.done, results.failed) == (2, 1)
