"""What a Python user can do with an engine, on real actors."""

import json
import logging
import os
import re
import signal
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ssd_ray import LLM, SamplingParams
from ssd_ray.cli import app
from ssd_ray.cluster import driver
from ssd_ray.errors import (
    ConfigError,
    EngineClosedError,
    EngineError,
    ModelError,
    PromptTooLongError,
    RequestError,
    RequestFailedError,
)
from tests.support.actors import info, wait_until
from tests.support.engines import at_rest, in_time, target_alone
from tests.support.tiny import with_weights

pytestmark = pytest.mark.ray

PROMPT = "def add(a, b):"
PARAMS = SamplingParams(max_tokens=24, seed=3, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, seed=5, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(cluster, pair):
    with LLM(*pair, num_drafts=1, inline_max_bytes=1024) as engine:
        yield engine


@pytest.fixture(autouse=True)
def no_page_is_held(llm):
    yield
    at_rest(lambda: llm.stats().as_dict())


@pytest.fixture(scope="module")
def expected(llm):
    """What PROMPT and PARAMS give; whatever happens to drafts must not change it."""
    return llm.generate(PROMPT, PARAMS)[0]


def free_cpus():
    return ray.available_resources()["CPU"]


def pinned_cores(pid):
    """The smallest set of cores that a thread of the process may use: that of the thread which decodes."""
    lists = []
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        text = re.search(r"Cpus_allowed_list:\s*(\S+)", status.read_text())[1]
        bounds = [[int(number) for number in part.split("-")] for part in text.split(",")]
        lists.append({core for part in bounds for core in range(part[0], part[-1] + 1)})
    return min(lists, key=len)


def test_a_result(expected):
    assert expected.prompt == PROMPT
    assert expected.finish_reason == "length"
    assert len(expected.token_ids) == expected.stats.tokens == 24
    assert 0 < expected.stats.rounds <= 24
    assert expected.text


def test_a_stream_is_the_text_in_pieces(llm, expected):
    stream = llm.stream(PROMPT, PARAMS)
    pieces = list(stream)
    assert "".join(pieces) == expected.text
    assert len(pieces) > 1
    assert stream.output.token_ids == expected.token_ids


def test_token_ids_are_a_prompt(llm, expected):
    tokens = llm._engine.models.prompt(PROMPT)
    assert llm.generate(tokens, PARAMS)[0].token_ids == expected.token_ids
    assert [output.text for output in llm.generate([tokens, PROMPT], PARAMS)] == [expected.text] * 2


def test_each_prompt_has_its_parameters(llm, expected):
    first, second = llm.generate([PROMPT, PROMPT], [PARAMS, SamplingParams(max_tokens=3, ignore_eos=True)])
    assert first.token_ids == expected.token_ids
    assert len(second.token_ids) == 3


def test_no_prompts_no_results(llm):
    assert llm.generate([]) == []


def call(engine, name, function):
    """Run a function in an actor's process, with the actor."""
    handle = engine._engine.driver.actors[name]
    return ray.get(handle.__ray_call__.options(concurrency_group="inbox").remote(function))


def watching():
    """What to do in a draft's process; local, so that it need not import this module."""

    def watch(process):
        channel, handover = process._actor._draft._uplink.channel, process._actor._draft._handover
        receive, give = channel.receive, handover.give

        def watched_receive(timeout=0.0):
            received = receive(timeout)
            if received is not None:
                process.frames.append(len(received[1]))
            return received

        def watched_give(sequence, prompt):
            process.prompts.append((len(prompt), prompt.flags.writeable, prompt.flags.owndata))
            give(sequence, prompt)

        channel.receive, handover.give = watched_receive, watched_give

    def clear(process):
        process.frames, process.prompts = [], []

    def seen(process):
        return max(process.frames, default=0), set(process.prompts), len(process._actor._draft._handover)

    return watch, clear, seen


def test_target_and_drafts_read_one_copy_of_a_long_prompt(llm, pair):
    """To a draft that is late the target says all of a sequence again, so not every attempt on a busy machine shows it;
    and what reaches a draft behind a sequence's end stays until the next one begins."""
    prompt, params = "x = 1\n" * 60, replace(PARAMS, max_tokens=100)
    watch, clear, seen = watching()
    tokens = llm._engine.models.prompt(prompt)
    assert 4 * len(tokens) > llm.config.inline_max_bytes
    (expected,) = target_alone(pair[0], [tokens], params)
    for name in llm.stats().drafts:
        call(llm, name, clear)
        call(llm, name, watch)

    def attempt():
        for name in llm.stats().drafts:
            call(llm, name, clear)
        output = llm.generate(prompt, params)[0]
        assert output.token_ids == expected
        return output.stats.sums.tree_tokens, [call(llm, name, seen) for name in llm.stats().drafts]

    def enough(result):
        tree_tokens, drafts = result
        # Views of memory that is the object store's, and no message, in bytes, had the prompt.
        one_copy = {(len(tokens), False, False)}
        return tree_tokens and all(
            0 < longest < len(tokens) and prompts == one_copy and not left for longest, prompts, left in drafts
        )

    in_time(attempt, enough)


def test_threads_may_share_an_engine(llm, expected):
    texts = []
    threads = [threading.Thread(target=lambda: texts.extend(llm.generate([PROMPT] * 3, PARAMS))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [output.text for output in texts] == [expected.text] * 12


def test_a_stop_string_ends_text_and_tokens(llm, expected):
    stop = expected.text[9:11]
    params = SamplingParams(max_tokens=24, seed=3, ignore_eos=True, stop=stop)
    output = llm.generate(PROMPT, params)[0]
    assert output.finish_reason == "stop"
    assert output.text == expected.text[: expected.text.index(stop)]
    assert output.token_ids == expected.token_ids[: len(output.token_ids)]
    assert len(output.token_ids) < 24


def test_what_ends_a_text_can_be_shown_and_bad_words_do_not_come(llm, expected):
    stop = expected.text[9:11]
    (shown,) = llm.generate(PROMPT, replace(PARAMS, stop=stop, include_stop_str_in_output=True))
    assert shown.text == expected.text[: expected.text.index(stop) + 2]
    words = (expected.text[4], stop)
    (output,) = llm.generate(PROMPT, replace(PARAMS, bad_words=words))
    assert len(output.token_ids) == 24
    assert not any(word in output.text for word in words)
    (named,) = llm.generate(PROMPT, replace(PARAMS, stop="<|end|>", logit_bias={0: 100}))
    assert (named.text, named.token_ids, named.finish_reason) == ("", [0], "stop")
    (special,) = llm.generate(PROMPT, replace(PARAMS, max_tokens=2, skip_special_tokens=False, logit_bias={0: 100}))
    assert special.text == "<|end|>" * 2


def test_several_texts_of_a_prompt(llm, expected):
    """Each is that of its seed, and the first is that of the prompt alone."""
    several, single = llm.generate([PROMPT, PROMPT], [replace(PARAMS, n=3), PARAMS])
    assert [output.token_ids for output in (several, single)] == [expected.token_ids] * 2
    assert [text.token_ids for text in several.outputs] == [
        llm.generate(PROMPT, replace(PARAMS, seed=PARAMS.seed + index))[0].token_ids for index in range(3)
    ]
    assert len({text.text for text in several.outputs}) == 3
    with pytest.raises(ConfigError, match="n: expected 1 for a stream"):
        llm.stream(PROMPT, replace(PARAMS, n=2))


def test_log_probabilities_are_those_of_transformers(llm, pair, expected):
    assert expected.logprobs is None
    params = replace(PARAMS, logprobs=3, repetition_penalty=1.2, stop=expected.text[10])
    output = llm.generate(PROMPT, params)[0]
    prompt = llm._engine.models.prompt(PROMPT)
    model = AutoModelForCausalLM.from_pretrained(pair[0])
    with torch.inference_mode():
        values = model(torch.tensor([prompt + output.token_ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert [entry.token_id for entry in output.logprobs] == output.token_ids
    assert "".join(output.pieces) == output.text
    for row, entry in zip(values, output.logprobs, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert list(entry.top.values()) == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        assert entry.rank == 1 + int((row > row[entry.token_id]).sum())


def test_a_bias_for_an_unknown_token_is_refused(llm):
    with pytest.raises(RequestError, match="logit_bias: expected token ids from 0 to 95, got 96"):
        llm.generate(PROMPT, SamplingParams(logit_bias={96: 1.0}))


def test_a_closed_stream_cancels_its_request(llm, expected):
    before = llm.stats().requests
    stream = llm.stream(PROMPT, LONG)
    next(stream)
    stream.close()
    wait_until(lambda: llm.stats().requests == before + 1)
    assert list(stream) == []
    assert stream.output is None
    assert llm.generate(PROMPT, PARAMS)[0].text == expected.text


def test_a_text_can_be_cut_short(llm):
    def cut():
        stream = llm.stream(PROMPT, LONG)
        first = next(stream)
        threading.Thread(target=stream.cancel).start()
        output = stream.wait()
        assert output.text.startswith(first)
        return output

    output = in_time(cut, lambda output: output.finish_reason == "cancelled")
    assert 0 < len(output.token_ids) < 400


def test_control_c_cancels_all_requests(llm, expected):
    before, over = llm.stats().tokens, threading.Event()

    def press():
        """Again if it was not heard: Python loses what is raised within a weak reference's callback."""
        while not over.wait(0.3 if not pressed else 10.0):
            pressed.append(True)
            os.kill(os.getpid(), signal.SIGINT)

    pressed = []
    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT] * 1000, LONG)
    over.set()
    assert llm.generate(PROMPT, PARAMS)[0].text == expected.text
    assert llm.stats().tokens - before < 1000 * LONG.max_tokens / 2


@pytest.mark.parametrize("submitted", [False, True])
def test_control_c_may_come_while_a_request_is_submitted(llm, monkeypatch, submitted):
    before = llm.stats()

    def interrupted(method, *args):
        monkeypatch.undo()
        if submitted:
            driver.call(method, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPT, LONG)
    wait_until(lambda: not llm._engine.driver._requests)
    assert at_rest(lambda: llm.stats().as_dict())["tokens"] - before.tokens < LONG.max_tokens / 2


def test_figures_are_summed(llm):
    before = llm.stats()
    output = llm.generate(PROMPT, PARAMS)[0]
    after = llm.stats()
    assert after.tokens - before.tokens == output.stats.tokens
    assert after.requests == before.requests + 1
    assert after.drafts == before.drafts
    assert len(after.drafts) == 1


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([[]], RequestError, "empty"),
        ("", RequestError, "empty"),
        ("x" * 512, PromptTooLongError, "512 tokens; the context of 512"),
        ([1, 2, 96], RequestError, "token ids from 0 to 95, got 96"),
        ([[1, -1]], RequestError, "got -1"),
        ([[1, "a"]], RequestError, "got 'a'"),
    ],
)
def test_a_bad_prompt_is_refused_before_anything_is_started(llm, prompt, error, message):
    before = llm.stats().requests
    with pytest.raises(error, match=message):
        llm.generate(prompt)
    assert llm.stats().requests == before


def test_callers_may_keep_their_habits(llm, expected):
    tokens = llm._engine.models.prompt(PROMPT)
    prompts = [{"prompt": PROMPT}, {"prompt_token_ids": tokens}, torch.tensor(tokens), np.array(tokens)]
    assert [output.token_ids for output in llm.generate(prompts, PARAMS)] == [expected.token_ids] * 4
    assert [output.token_ids for output in llm.generate(np.array([tokens] * 2), PARAMS)] == [expected.token_ids] * 2
    assert llm.generate(PROMPT, replace(PARAMS, top_k=-1, seed=3 - 2**63))[0].token_ids == expected.token_ids
    (whole,) = llm.generate(PROMPT, replace(PARAMS, max_tokens=None))
    assert len(whole.token_ids) == 512 - len(tokens)
    assert whole.token_ids[:24] == expected.token_ids


def test_without_a_seed_each_text_has_another_one_and_names_it(llm, expected):
    assert expected.seed == 3
    outputs = llm.generate([PROMPT] * 2, replace(PARAMS, seed=None, n=2))
    texts = [text for output in outputs for text in output.outputs]
    assert len({text.seed for text in texts}) == len({tuple(text.token_ids) for text in texts}) == 4
    for text in texts:
        assert llm.generate(PROMPT, replace(PARAMS, seed=text.seed))[0].token_ids == text.token_ids


@pytest.mark.parametrize("params", [{"temperature": 0.5}, "greedy", [None, {}]])
def test_what_are_no_parameters(llm, params):
    with pytest.raises(ConfigError, match="params: expected a SamplingParams"):
        llm.generate([PROMPT] * 2, params)
    with pytest.raises(ConfigError, match="params: expected a SamplingParams"):
        llm.stream(PROMPT, params)


def test_a_prompt_that_cannot_be_served_may_be_a_result(llm, expected):
    prompts = [PROMPT, "x" * 600, "\ud83d", PROMPT]
    first, long, half, last = llm.outputs(prompts, PARAMS, on_error="continue")
    assert [first.text, last.text] == [expected.text] * 2
    assert (long.text, long.token_ids, long.finish_reason) == ("", [], "error")
    assert "the context of 512" in long.error
    assert "UTF-8" in half.error
    assert first.error is None
    with pytest.raises(ConfigError, match="on_error: expected 'stop' or 'continue'"):
        llm.outputs(prompts, PARAMS, on_error="shrug")


def test_what_one_request_raises_in_the_target_ends_that_request(llm, expected):
    def raise_for_seed_77(process):
        target = process._actor._target
        make = target._row

        def row(request):
            if request.params.seed == 77:
                raise ArithmeticError("a mistake")
            return make(request)

        target._row = row

    call(llm, "target", raise_for_seed_77)
    params = [PARAMS, replace(PARAMS, seed=77), PARAMS]
    first, bad, last = llm.outputs([PROMPT] * 3, params, on_error="continue")
    assert [first.text, last.text] == [expected.text] * 2
    assert bad.error == "the target could not go on with it: ArithmeticError: a mistake"
    with pytest.raises(RequestFailedError, match="ArithmeticError: a mistake"):
        llm.generate([PROMPT] * 3, params)


def test_there_is_one_set_of_parameters_for_each_prompt(llm):
    with pytest.raises(ConfigError, match="one for each prompt"):
        llm.generate(["a", "b"], [PARAMS])


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_actors_have_cores_of_their_own(llm):
    cores = [pinned_cores(info(llm, name)["pid"]) for name in ("target", "draft-0")]
    assert all(cores)
    assert cores[0].isdisjoint(cores[1])


def test_actors_run_at_the_drivers_priority(llm):
    assert os.getpriority(os.PRIO_PROCESS, info(llm, "target")["pid"]) == os.getpriority(os.PRIO_PROCESS, 0)


def test_drafts_come_and_go_while_requests_run(llm, expected):
    """An example goes further."""
    texts, stop = [], threading.Event()

    def decode():
        while not stop.is_set():
            texts.append("".join(llm.stream(PROMPT, PARAMS)))

    thread = threading.Thread(target=decode)
    thread.start()
    try:
        for count in (2, 1):
            llm.scale_drafts(count)
            wait_until(lambda count=count: len(llm.stats().drafts) == count)
    finally:
        stop.set()
        thread.join()
    assert Counter(texts) == {expected.text: len(texts)}
    assert llm.generate(PROMPT, PARAMS)[0].stats.misses["no_draft"] == 0


def test_a_dead_draft_is_reported_and_replaced(llm, expected, caplog):
    llm.scale_drafts(1)
    (name,) = llm.stats().drafts
    before = llm.stats().draft_restarts
    with caplog.at_level(logging.WARNING, logger="ssd_ray"):
        os.kill(info(llm, name)["pid"], signal.SIGKILL)
        wait_until(lambda: name not in llm.stats().drafts)
        wait_until(lambda: name in caplog.text)
    assert llm.generate(PROMPT, PARAMS)[0].text == expected.text
    wait_until(lambda: llm.stats().draft_restarts == before + 1, seconds=60.0)
    assert len(llm.stats().drafts) == 1
    in_time(lambda: llm.generate(PROMPT, PARAMS)[0], lambda output: output.stats.sums.tree_tokens > 0)


def test_without_drafts_every_round_misses(llm, expected):
    llm.scale_drafts(0)
    output = llm.generate(PROMPT, PARAMS)[0]
    assert (output.text, output.stats.hit_rate) == (expected.text, 0.0)
    assert output.stats.misses["no_draft"] > 0


@pytest.mark.parametrize("count", [-1, 10**6, 1.5, "2"])
def test_a_bad_number_of_drafts(llm, count):
    with pytest.raises(ConfigError, match="num_drafts"):
        llm.scale_drafts(count)


def test_the_command_line_writes_the_same_text(cluster, pair, expected, tmp_path):
    """With another method even."""
    sampling = ["--max-tokens", "24", "--seed", "3", "--ignore-eos"]
    engine = ["--target", pair[0], "--method", "sd", "--draft", pair[1]]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"x\n{PROMPT}\n")
    result = CliRunner().invoke(app, ["generate", *engine, *sampling, "--prompt-file", str(prompts)])
    assert result.exit_code == 0, result.output
    documents = [json.loads(line) for line in result.stdout.splitlines()]
    assert [document["prompt"] for document in documents] == ["x", PROMPT]
    assert documents[1]["text"] == expected.text
    assert "(48 tokens in" in result.stderr


def test_the_text_itself_is_the_draft_where_none_fits(cluster, pair, expected, tmp_path, monkeypatch, caplog):
    """The folder is a relative one, though actors stand elsewhere, and has a weight too many."""
    with_weights(pair[0], tmp_path / "model", {"surplus": torch.zeros(1)})
    monkeypatch.chdir(tmp_path)
    with LLM("model") as engine:
        assert "the bundled one does not fit, so the text itself is the draft" in caplog.text
        assert f"target: {tmp_path / 'model'} has weights that the model has not: surplus" in caplog.text
        assert list(engine._engine.driver.actors) == ["target"]
        assert engine.generate(PROMPT, PARAMS)[0].text == expected.text
        looping = engine.generate(PROMPT, SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True))[0]
        assert looping.stats.backups["ngram"] > 0
        assert looping.stats.tokens_per_round > 1.0
        assert engine.stats().plan.startswith(
            "speculate up to 15 tokens that followed the same ones earlier in the text"
        )
        with pytest.raises(ConfigError, match=r"^draft: expected a model, of which there can be several, got 'ngram'"):
            engine.scale_drafts(1)


def outlived(engine, params, kills):
    """What comes of texts whose target is killed, again as soon as there is another one if it is more than once."""
    before = engine.stats().target_restarts
    streams = [engine.stream(PROMPT, each) for each in params[:-1]]
    for stream in streams:
        next(stream)
    for kill in range(kills):
        os.kill(info(engine, "target")["pid"], signal.SIGKILL)
        if kill == 0:  # while there is no target
            streams.append(engine.stream(PROMPT, params[-1]))
            (late,) = engine.generate(PROMPT, LONG, timeout=0.2)
            assert late.finish_reason == "timeout"
        wait_until(lambda kill=kill: engine.stats().target_restarts == before + kill + 1, seconds=60.0)
    return [stream.wait() for stream in streams]


@pytest.mark.parametrize("kills", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_texts_outlive_their_target(llm, expected, kills):
    texts = [replace(LONG, seed=seed, max_tokens=200 + 20 * seed) for seed in range(4)]
    texts += [replace(LONG, repetition_penalty=1.1, logprobs=1), replace(LONG, temperature=0.0), PARAMS]
    llm.scale_drafts(1)
    calm = llm.generate([PROMPT] * len(texts), texts)
    before = llm.stats()
    again = outlived(llm, texts, kills)
    for one, other in zip(calm, again, strict=True):
        assert (other.text, other.token_ids, other.finish_reason) == (one.text, one.token_ids, one.finish_reason)
        assert other.stats.tokens == one.stats.tokens
    assert again[-1].text == expected.text
    assert again[-3].pieces == calm[-3].pieces
    pairs = zip(again[-3].logprobs, calm[-3].logprobs, strict=True)
    assert all(one.logprob == pytest.approx(other.logprob, abs=1e-5) for one, other in pairs)
    after = llm.stats()
    assert after.requests == before.requests + len(texts) + 1  # and the one that was late
    assert after.sums.resumed_tokens > before.sums.resumed_tokens
    wait_until(lambda: len(llm.stats().drafts) == 1)
    in_time(lambda: llm.generate(PROMPT, PARAMS)[0], lambda output: output.stats.sums.tree_tokens > 0)


def test_actor_calls_can_carry_everything_and_a_target_that_is_not_replaced_ends_every_request(
    cluster, pair, expected, tmp_path
):
    engine = LLM(*pair, transport="ray", max_restarts=0, trace=tmp_path / "trace.json")
    assert engine.generate(PROMPT, PARAMS)[0].text == expected.text
    assert engine.stats().misses["no_draft"] == 0
    target = info(engine, "target")["pid"]
    first, *_, last = [engine.stream(PROMPT, LONG) for _ in range(50)]
    next(first)
    os.kill(target, signal.SIGKILL)
    with pytest.raises(EngineError, match=r"target died: .*; it is not started again, as max_restarts=0 has it$"):
        list(last)
    with pytest.raises(EngineError, match="target died"):
        engine.generate(PROMPT)
    with pytest.raises(EngineError, match="target died"):
        engine.scale_drafts(2)
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.generate(PROMPT)
    engine.close()
    trace = json.loads((tmp_path / "trace.json").read_bytes())
    assert trace["otherData"]["lost"] == ["target"]
    assert {"step", "send", "receive"} <= {event["name"] for event in trace["traceEvents"]}


def test_a_failed_start_leaves_nothing_running(cluster, llm, pair, tmp_path):
    """The model passes the checks, but turns out to lack a weight."""
    with_weights(pair[0], tmp_path, {"model.norm.weight": None})
    llm.scale_drafts(0)
    wait_until(lambda: free_cpus() == ray.cluster_resources()["CPU"] - 1)  # the target of the module's engine
    with pytest.raises(ModelError, match=r"target: .* lacks weights that the model has: model\.norm\.weight"):
        LLM(tmp_path, method="ar")
    wait_until(lambda: free_cpus() == ray.cluster_resources()["CPU"] - 1)


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["zmq", "ray"])
def test_rejection_mode_with_laws_over_the_whole_vocabulary(cluster, pair, transport):
    """Frames of laws are beyond what goes inline here, so they ride on object refs with either transport."""
    fields = {"sampler": "rejection", "law_tokens": 0, "text_lookup": False, "inline_max_bytes": 1024}
    with LLM(pair[0], pair[0], transport=transport, **fields) as engine:

        def drafted(seed):
            output = engine.generate(PROMPT, SamplingParams(max_tokens=200, seed=seed, ignore_eos=True))[0]
            assert len(output.token_ids) == 200
            return output.stats.sums.tree_tokens

        # Whether they are worth verifying is another matter: this draft is as slow as its target.
        assert any(drafted(seed) for seed in range(30))
