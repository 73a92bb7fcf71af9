"""Many clients at once: the asynchronous engine, its queue, deadlines and cancellations, on real actors."""

import asyncio
import gc
import itertools
import threading

import pytest

from ssd_ray import LLM, AsyncLLM, SamplingParams
from ssd_ray.errors import ConfigError, EngineClosedError, EngineError, QueueFullError, RequestError
from tests.support.engines import at_rest, in_time, stopped

pytestmark = pytest.mark.ray

PROMPT = "def add(a, b):"
SHORT = SamplingParams(max_tokens=8, seed=3, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, seed=5, ignore_eos=True)
MAX_QUEUE = 6
SECONDS = 60.0


@pytest.fixture(scope="module")
def engines(cluster, pair):
    """The same engine with both faces, and the text that PROMPT and SHORT give."""
    with LLM(pair[0], "ngram", max_queue=MAX_QUEUE, max_num_seqs=2) as blocking:
        llm = AsyncLLM(pair[0], "ngram", max_queue=MAX_QUEUE, max_num_seqs=2)
        llm._started = blocking._engine
        yield blocking, llm, blocking.generate(PROMPT, SHORT)[0].text


@pytest.fixture
def llm(engines):
    return engines[1]


@pytest.fixture
def blocking(engines):
    return engines[0]


@pytest.fixture
def expected(engines):
    return engines[2]


@pytest.fixture(autouse=True)
def no_page_is_held(blocking):
    yield
    at_rest(lambda: blocking.stats().as_dict())


def run(coroutine):
    async def bounded():
        return await asyncio.wait_for(coroutine, SECONDS)

    return asyncio.run(bounded())


async def all_rows_free(llm):
    while True:
        stats = await llm.stats()
        if not stats.running and not stats.waiting:
            return stats
        await asyncio.sleep(0.02)


@pytest.mark.slow
def test_it_starts_and_stops_with_its_block(cluster, pair):
    async def use():
        llm = AsyncLLM(*pair, num_drafts=0)
        with pytest.raises(EngineError, match="not been started"):
            await llm.stats()
        async with llm:
            await llm.scale_drafts(1)
            assert len((await llm.stats()).drafts) == 1
            stream = llm.stream(PROMPT, LONG)
            assert await anext(stream)
        with pytest.raises(EngineClosedError):
            await stream.wait()
        with pytest.raises(EngineClosedError):
            await llm.generate(PROMPT, SHORT)

    run(use())


def test_bad_fields_are_refused_at_once():
    with pytest.raises(ConfigError, match="colour"):
        AsyncLLM(colour="red")


def test_texts_are_those_of_the_blocking_engine(llm, expected):
    async def use():
        stream = llm.stream(PROMPT, SHORT)
        pieces = [piece async for piece in stream]
        outputs = await llm.generate([PROMPT] * 3, SHORT)
        return pieces, stream.output, outputs

    pieces, output, outputs = run(use())
    assert len(pieces) > 1
    assert "".join(pieces) == output.text == expected
    assert [each.text for each in outputs] == [expected] * 3


def test_streams_run_at_the_same_time_without_threads_of_their_own(llm, expected):
    async def use():
        before = threading.active_count()
        streams = [llm.stream(PROMPT, SHORT) for _ in range(MAX_QUEUE)]
        assert threading.active_count() == before
        return await asyncio.gather(*(stream.wait() for stream in streams))

    assert [output.text for output in run(use())] == [expected] * MAX_QUEUE


def test_a_request_beyond_the_queue_is_refused_at_once(llm, blocking):
    async def use():
        with stopped(blocking, "target"):
            streams = [llm.stream(PROMPT, LONG) for _ in range(MAX_QUEUE)]
            with pytest.raises(QueueFullError, match="6 requests are under way"):
                llm.stream(PROMPT, LONG)
            with pytest.raises(QueueFullError):
                blocking.stream(PROMPT, LONG)
        for stream in streams:
            await stream.aclose()
        await all_rows_free(llm)
        return await llm.stream(PROMPT, SHORT).wait()

    assert len(run(use()).token_ids) == 8


def test_generate_waits_for_room_that_others_take(llm, blocking, expected):
    async def use():
        with stopped(blocking, "target"):
            streams = [llm.stream(PROMPT, LONG) for _ in range(MAX_QUEUE)]
            several = asyncio.create_task(llm.generate([PROMPT] * 3, SHORT))
            from_thread = asyncio.create_task(asyncio.to_thread(blocking.generate, [PROMPT] * 3, SHORT))
            await asyncio.sleep(0.1)
            assert not several.done()
            assert not from_thread.done()
        for stream in streams:
            await stream.aclose()
        return await several + await from_thread

    assert [output.text for output in run(use())] == [expected] * 6


def test_any_number_of_prompts_may_be_made_as_they_are_needed(llm, blocking, expected):
    """Neither prompts nor results are held: the endless generator is asked for a few prompts ahead."""
    made = []

    def prompts():
        for number in itertools.count():
            made.append(number)
            yield PROMPT if number % 2 else "x"

    for count, output in enumerate(blocking.outputs(prompts(), SHORT)):
        assert output.prompt == (PROMPT if count % 2 else "x")
        assert len(made) <= count + 1 + MAX_QUEUE
        if count == 3 * MAX_QUEUE:
            break

    async def use():
        taken = []
        async for output in llm.outputs(prompts(), SHORT):
            taken.append(output)
            if len(taken) == 10:
                return taken

    assert all(output.text == expected for output in run(use()) if output.prompt == PROMPT)


def test_prompts_and_parameters_that_come_one_by_one_have_to_be_as_many(blocking):
    with pytest.raises(ConfigError, match="fewer parameters than prompts"):
        blocking.generate(iter([PROMPT] * 2), iter([SHORT]))
    with pytest.raises(ConfigError, match="more parameters than prompts"):
        blocking.generate(iter([PROMPT]), iter([SHORT] * 2))


def test_several_texts_of_several_prompts(llm, blocking):
    """More texts than the queue has room for."""
    params = SamplingParams(max_tokens=8, seed=3, ignore_eos=True, n=MAX_QUEUE + 1)
    outputs = blocking.generate([PROMPT, "x"], params)
    assert [output.prompt for output in outputs] == [PROMPT, "x"]
    for output in outputs:
        singles = [blocking.generate(output.prompt, each)[0].text for each in params.texts()]
        assert [text.text for text in output.outputs] == singles
    again = run(llm.generate([PROMPT, "x"], params))
    assert [text.text for output in again for text in output.outputs] == [
        text.text for output in outputs for text in output.outputs
    ]
    with pytest.raises(ConfigError, match="1 for a stream"):
        blocking.stream(PROMPT, params)


def test_a_text_ends_at_its_deadline_with_what_has_come(llm, blocking):
    endless = SamplingParams(max_tokens=490, seed=5, ignore_eos=True)
    full = blocking.generate("x", endless)[0]
    async_output = run(llm.generate("x", endless, timeout=0.02))[0]
    for output in (async_output, *blocking.generate(["x"] * 3, endless, timeout=0.02)):
        assert output.finish_reason == "timeout"
        assert len(output.token_ids) < 490
        assert full.text.startswith(output.text)
        assert output.stats.tokens == len(output.token_ids)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), "soon", True])
def test_a_bad_timeout(blocking, timeout):
    with pytest.raises(ConfigError, match="timeout: expected a number above 0"):
        blocking.stream(PROMPT, SHORT, timeout=timeout)


def test_a_bad_prompt_is_an_error_of_the_request_alone(llm, expected):
    async def use():
        with pytest.raises(RequestError):
            llm.stream("", SHORT)
        return await llm.generate(PROMPT, SHORT)

    assert run(use())[0].text == expected


class TestLeaving:
    """However a request is left, its row is free soon after."""

    def check(self, llm, leave):
        async def use():
            stream = llm.stream(PROMPT, LONG)
            await anext(stream)
            await leave(stream)
            del stream
            return await all_rows_free(llm)

        def tokens():
            before, after = run(llm.stats()), run(use())
            assert after.requests == before.requests + 1
            return after.tokens - before.tokens

        in_time(tokens, lambda tokens: tokens < LONG.max_tokens)

    def test_by_cancelling_the_task_that_reads(self, llm):
        async def leave(stream):
            task = asyncio.create_task(stream.wait())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert [piece async for piece in stream] == []

        self.check(llm, leave)

    def test_by_closing_the_stream(self, llm):
        self.check(llm, lambda stream: stream.aclose())

    def test_by_forgetting_it(self, llm):
        async def use():
            async for _ in llm.stream(PROMPT, LONG):
                break
            gc.collect()
            return await all_rows_free(llm)

        before = run(llm.stats())
        after = run(use())
        assert after.requests == before.requests + 1
        assert after.tokens - before.tokens < LONG.max_tokens

    def test_by_the_end_of_the_event_loop(self, llm):
        async def use():
            return llm.stream(PROMPT, LONG)

        stream = run(use())
        del stream
        run(all_rows_free(llm))

    def test_a_cut_text_keeps_what_has_come(self, llm):
        async def use():
            stream = llm.stream(PROMPT, LONG)
            first = await anext(stream)
            stream.cancel()
            output = await stream.wait()
            return first, output

        first, output = run(use())
        assert output.finish_reason == "cancelled"
        assert output.text.startswith(first)
