"""Real models, as they lie on disks: ``SSD_RAY_REAL_MODELS=~/models/a:~/models/b,~/models/b-draft make real``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from time import monotonic

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ssd_ray import LLM, SamplingParams
from ssd_ray.chat import chat_prompt
from ssd_ray.config import EngineConfig
from ssd_ray.models.contract import PAGE_SLOTS
from ssd_ray.models.info import load_tokenizer, model_info
from tests.support.engines import engine

pytestmark = [pytest.mark.real, pytest.mark.timeout(7200)]

QUESTIONS = ("What is the capital of France? Answer with one word.", "Say hello.")
TEXTS = ("def add(a, b):",)
CHAT_TOKENS, TEXT_TOKENS, CONTEXT, SHORT = 64, 32, 512, 192
EIGHT = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=100)
GIB = 2**30


def prompts(path: Path) -> list[tuple[list[int], int]]:
    """Tokens to begin with, in the model's chat template where it has one, and how many to write at most."""
    tokenizer = load_tokenizer(str(path))
    chats = [chat_prompt(tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]
    chats = [chat if isinstance(chat, list) else tokenizer(chat).input_ids for chat in chats]
    texts = [tokenizer(text).input_ids for text in TEXTS]
    return [(chat, CHAT_TOKENS) for chat in chats] + [(text, TEXT_TOKENS) for text in texts]


@cache
def generated(path: Path) -> list[tuple[list[int], str]]:
    """Tokens and texts that transformers' greedy generate writes in float32."""
    tokenizer = load_tokenizer(str(path))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
    results = []
    for tokens, count in prompts(path):
        inputs = torch.tensor([tokens])
        ones = torch.ones_like(inputs)
        whole = model.generate(inputs, attention_mask=ones, do_sample=False, max_new_tokens=count)
        written = whole[0, len(tokens) :].tolist()
        results.append((written, tokenizer.decode(written, skip_special_tokens=True)))
    return results


@pytest.mark.ray
@pytest.mark.parametrize("method", ["ar", "sd", "ssd"])
def test_texts_are_those_of_transformers(models, method: str, record_property: Callable[[str, object], None]) -> None:
    expected = generated(models.target)
    ends = set(model_info(str(models.target)).eos_token_ids)
    assert any(tokens[-1] in ends for tokens, _ in expected)
    each = [(tokens, SamplingParams(temperature=0.0, max_tokens=count)) for tokens, count in prompts(models.target)]
    options = {"method": method, "dtype": "float32", "max_model_len": CONTEXT, "max_num_seqs": 4}
    start = monotonic()
    with LLM(str(models.target), str(models.draft), **options) as llm:
        record_property("engine up after", f"{monotonic() - start:.1f} s")
        outputs = llm.generate([tokens for tokens, _ in each], [params for _, params in each])
    assert [(output.token_ids, output.text) for output in outputs] == expected


@pytest.fixture(scope="module")
def written_alone(models) -> tuple[list[list[int]], list[list[int]]]:
    """Eight parts of a real text, and what plain decoding writes behind each with memory enough."""
    tokens = load_tokenizer(str(models.target))(Path(__file__).read_text()).input_ids
    parts = [tokens[20 * number : 20 * number + 85 + number] for number in range(8)]
    with engine(config(models, method="ar"), "memory") as generate:
        return parts, generate(parts, EIGHT)[0]


def config(models, **options: object) -> EngineConfig:
    """Of eight rows, short ones."""
    folders = {"target": str(models.target), "draft": str(models.draft)}
    common = {"dtype": "float32", "device": "cpu", "max_model_len": SHORT, "max_num_seqs": 8}
    return EngineConfig.from_kwargs(**folders | common | options)


def test_eight_at_once_where_memory_is_scarce(models, written_alone) -> None:
    parts, expected = written_alone
    slots = 2 * (SHORT // PAGE_SLOTS + 1) * PAGE_SLOTS
    memory = slots * model_info(str(models.target)).kv_bytes_per_slot * 2 / GIB  # which counts two bytes a number
    with engine(config(models, kv_memory=memory), "memory") as generate:
        texts, stats = generate(parts, EIGHT)
    assert texts == expected
    assert sum(each.preemptions for each in stats) > 0


def test_a_prefix_that_is_there_already(models, written_alone) -> None:
    parts, expected = written_alone
    with engine(config(models), "memory") as generate:
        generate([parts[-1][:-8]], EIGHT)
        (text,), (stats,) = generate([parts[-1]], EIGHT)
    assert text == expected[-1]
    assert stats.cached_tokens >= PAGE_SLOTS


LOAD = f"""
import re, sys, time
import torch
from ssd_ray.models.loader import load_runner

def peak():  # not ru_maxrss, which a process inherits from the one that started it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

before, start = peak(), time.monotonic()
runner = load_runner(sys.argv[1], role="target", rows=1, max_length={CONTEXT}, scratch=32, device="cpu")
finite = bool(runner.append([0], [[1, 2, 3]], [0])[0].isfinite().all())
print(time.monotonic() - start, peak() - before, runner.dtype, finite)
"""


def test_a_model_loads_in_a_dtype_that_suits_the_machine(
    models, record_property: Callable[[str, object], None]
) -> None:
    """In a process of its own, whose memory the operating system measures."""
    done = subprocess.run([sys.executable, "-c", LOAD, models.target], capture_output=True, text=True, check=True)
    seconds, peak, dtype, finite = done.stdout.split()
    assert finite == "True"
    own = AutoConfig.from_pretrained(models.target, local_files_only=True).dtype
    wider = getattr(torch, dtype.split(".")[1]).itemsize / own.itemsize
    weights = wider * model_info(str(models.target)).parameter_bytes
    assert float(peak) > weights / 2
    record_property("loaded in", f"{float(seconds):.1f} s as {dtype}")
    record_property("peak memory", f"{float(peak) / GIB:.2f} GiB for {weights / GIB:.2f} GiB of weights")
    # The file that is mapped, and the weights in the order in which they are read: no third copy.
    assert float(peak) < 2.3 * weights + GIB / 2
