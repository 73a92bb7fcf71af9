"""OpenAI's requests, replies and errors as data."""

import json
from math import inf
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from ssd_ray.chat import chat_prompt
from ssd_ray.cluster.openai import ChatRequest, CompletionRequest, Reply, error_reply
from ssd_ray.cluster.routes import Json
from ssd_ray.config import SamplingParams
from ssd_ray.errors import (
    ConfigError,
    EngineError,
    PromptTooLongError,
    QueueFullError,
    RequestError,
    RequestFailedError,
)
from ssd_ray.stats import Stats
from ssd_ray.text import Characters, spelling
from ssd_ray.wire import RequestStats
from tests.support.tiny import tiny_tokenizer
from tests.support.tokenizers import BYTES, EMOJI, END, PARTS, WORDS, tokens_of

SPELLING = spelling(PARTS)
MESSAGES = [{"role": "user", "content": "hi"}]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def completion(**fields):
    return CompletionRequest.model_validate({"prompt": "x"} | fields)


def chat(**fields):
    return ChatRequest.model_validate({"messages": MESSAGES} | fields)


def output(text="ab", reason="stop", logprobs=None, cached=0):
    stats = Stats(sums=RequestStats(prompt_tokens=3, tokens=len(text), cached_tokens=cached))
    return SimpleNamespace(
        text=text, finish_reason=reason, token_ids=list(range(len(text))), stats=stats, logprobs=logprobs
    )


class TestParameters:
    def test_openais_defaults(self):
        params = completion().params(512, SamplingParams())
        assert params == SamplingParams(max_tokens=16, seed=params.seed)
        assert chat().params(512, SamplingParams()).max_tokens == 512

    def test_without_a_seed_each_request_has_its_own(self):
        assert completion().params(512, SamplingParams()).seed != completion().params(512, SamplingParams()).seed

    def test_fields_of_the_sampling_go_by_their_names(self):
        fields = {"temperature": 0, "top_p": 0.5, "max_tokens": 3, "stop": "x", "seed": 7}
        ours = {"top_k": 4, "min_p": 0.1, "stop_token_ids": [5], "ignore_eos": True}
        assert completion(**fields, **ours).params(512, SamplingParams()) == SamplingParams(**fields, **ours)

    def test_the_models_own_sampling_holds_where_nothing_is_said(self):
        own = SamplingParams(temperature=0.6, top_k=20, max_tokens=300)
        assert completion(top_k=7, seed=1).params(512, own) == SamplingParams(
            temperature=0.6, top_k=7, max_tokens=16, seed=1
        )

    def test_the_length_of_a_chat_has_two_names(self):
        assert chat(max_tokens=5).params(512, SamplingParams()).max_tokens == 5
        assert chat(max_completion_tokens=6).params(512, SamplingParams()).max_tokens == 6

    def test_null_is_as_if_left_out(self):
        assert completion(temperature=None, stop=None, seed=1, echo=None).params(512, SamplingParams()) == completion(
            seed=1
        ).params(512, SamplingParams())

    @pytest.mark.parametrize(
        "field", [{"user": "me"}, {"n": 1}, {"echo": False}, {"best_of": 1}, {"tools": []}, {"logit_bias": {}}]
    )
    def test_what_changes_nothing_is_taken(self, field):
        assert completion(**field, seed=1).params(512, SamplingParams()) == completion(seed=1).params(
            512, SamplingParams()
        )

    @pytest.mark.parametrize("field", [{"echo": True}, {"tools": [{"type": "function"}]}, {"colour": "red"}])
    def test_what_is_not_done_is_refused(self, field):
        (name,) = field
        with pytest.raises(ConfigError) as caught:
            completion(**field).params(512, SamplingParams())
        assert caught.value.field == name

    def test_false_is_no_log_probabilities(self):
        for fields in ({"logprobs": False}, {"logprobs": None}, {}):
            assert completion(**fields, seed=1).params(512, SamplingParams()).logprobs is None
            assert chat(**fields, seed=1).params(512, SamplingParams()).logprobs is None
        assert completion(logprobs=0).params(512, SamplingParams()).logprobs == 0

    @pytest.mark.parametrize("fields", [{"top_k": -1}, {"seed": -1}, {"seed": 2**70}, {"logit_bias": {"3": 1}}])
    def test_habits_of_callers(self, fields):
        given = {"seed": 1} | fields
        assert completion(**given).params(512, SamplingParams()) == SamplingParams(max_tokens=16, **given)

    @pytest.mark.parametrize(
        "fields",
        [
            {"temperature": True},
            {"temperature": "1"},
            {"max_tokens": 2.5},
            {"max_tokens": "3"},
            {"seed": True},
            {"ignore_eos": 1},
            {"temperature": 10**400},
        ],
    )
    def test_numbers_are_what_they_are_in_json(self, fields):
        with pytest.raises(ValidationError):
            completion(**fields)

    @pytest.mark.parametrize(
        "fields",
        [
            {"logprobs": "x"},
            {"logprobs": True},
            {"stop": "\ud83d"},
            {"stop": [3]},
            {"stop_token_ids": [2**70]},
            {"logit_bias": {"x": 1}},
            {"repetition_penalty": 1e-45},
            {"colour \N{SNOWMAN}": 1},
        ],
    )
    def test_the_rest_is_looked_at_by_the_sampling(self, fields):
        with pytest.raises(ConfigError) as caught:
            completion(**fields).params(512, SamplingParams())
        status, body = error_reply(caught.value)
        assert (status, body["error"]["param"]) == (400, *fields)
        assert json.loads(Json(body).body) == body

    @pytest.mark.parametrize("prompt", [None, 3, {"text": "x"}, [1, "x"]])
    def test_what_is_no_prompt(self, prompt):
        with pytest.raises(ValidationError):
            completion(prompt=prompt)


class TestPrompts:
    @pytest.mark.parametrize(
        ("prompt", "prompts"),
        [("x", ["x"]), (["x", "y"], ["x", "y"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
    )
    def test_one_or_several_in_text_or_tokens(self, prompt, prompts):
        assert completion(prompt=prompt).prompts(None) == prompts

    def test_a_conversation_without_a_template(self):
        parts = [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1?"}]
        request = chat(messages=[{"role": "system", "content": "Add."}, {"role": "user", "content": parts}])
        assert request.prompts(tiny_tokenizer(96)) == ["system: Add.\nuser: 1 + 1?\nassistant:"]

    def test_a_conversation_with_a_template(self):
        tokenizer = tiny_tokenizer(96)
        tokenizer.chat_template = TEMPLATE
        (prompt,) = chat().prompts(tokenizer)
        assert tokenizer.decode(prompt) == "<user>hi<a>"

    def test_a_template_may_refuse(self):
        tokenizer = tiny_tokenizer(96)
        tokenizer.chat_template = "{{ raise_exception('no system here') }}"
        with pytest.raises(RequestError, match="no system here"):
            chat_prompt(tokenizer, MESSAGES)

    @pytest.mark.parametrize("template", [None, TEMPLATE])
    @pytest.mark.parametrize("name", ["role", "content"])
    def test_half_a_character_is_refused(self, template, name):
        tokenizer = tiny_tokenizer(96)
        tokenizer.chat_template = template
        with pytest.raises(RequestError, match="messages: expected texts that UTF-8 can write"):
            chat_prompt(tokenizer, [MESSAGES[0] | {name: "a\ud83d"}])


class TestReplies:
    def test_usage_counts_a_prompt_of_several_texts_once(self):
        reply = Reply(completion(), "m", SPELLING, texts=2).whole([output(), output("abc"), output(), output()])
        figures = {name: reply["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
        assert figures == {"prompt_tokens": 6, "completion_tokens": 9, "total_tokens": 15}
        assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]

    def test_usage_tells_how_much_of_the_prompts_was_cached(self):
        outputs = [output(cached=2), output(cached=3), output(cached=8), output(cached=3)]  # 8: preempted, found again
        reply = Reply(completion(), "m", SPELLING, texts=2).whole(outputs)
        assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": 2 + 3}

    @pytest.mark.parametrize(
        ("ours", "theirs"), [("stop", "stop"), ("length", "length"), ("timeout", "length"), ("cancelled", "length")]
    )
    def test_reasons_are_openais(self, ours, theirs):
        for request in (completion(), chat()):
            reply = Reply(request, "m", SPELLING)
            assert reply.whole([output(reason=ours)])["choices"][0]["finish_reason"] == theirs
            assert reply.end(0, output(reason=ours))["choices"][0]["finish_reason"] == theirs

    def test_only_a_stream_that_asks_for_it_tells_the_usage(self):
        silent = Reply(completion(stream=True), "m", SPELLING)
        assert silent.usage([output()]) == []
        assert "usage" not in silent.piece(0, "x")
        telling = Reply(completion(stream=True, stream_options={"include_usage": True}), "m", SPELLING)
        assert telling.piece(0, "x")["usage"] is None
        assert telling.usage([output()])[0]["usage"]["total_tokens"] == 5


class TestLogprobs:
    """As clients read them: pieces joined are the text, offsets are places in it, bytes are the tokens' own."""

    def reply(self, request, tokenizer, tokens, *, candidates=(), context=()):
        known = spelling(tokenizer)
        characters = Characters(known, context)
        pieces = [characters.push(token) for token in tokens]
        entries = [
            SimpleNamespace(token_id=token, logprob=-0.5, top=dict.fromkeys(candidates, -1.0) | {token: -0.5})
            for token in tokens
        ]
        done = output("".join(pieces), logprobs=entries)
        done.pieces = pieces
        return Reply(request, "m", known).whole([done])["choices"][0]

    @pytest.mark.parametrize(
        ("tokenizer", "tokens", "pieces"),
        [
            (BYTES, tokens_of(BYTES, "a😀b"), ["a", "", "", "", "😀", "b"]),
            (WORDS, [1, 2, *tokens_of(WORDS, EMOJI), 3], [" a", " b", "", "", "", "😀", "c"]),
            (BYTES, [*tokens_of(BYTES, "a"), END], ["a", ""]),
        ],
    )
    def test_pieces_offsets_and_bytes(self, tokenizer, tokens, pieces):
        context = [3] if tokenizer is WORDS else []
        choice = self.reply(completion(), tokenizer, tokens, context=context)
        found = choice["logprobs"]
        assert found["tokens"] == pieces
        assert [choice["text"][at:].startswith(piece) for at, piece in zip(found["text_offset"], pieces, strict=True)]
        assert found["text_offset"] == [len("".join(pieces[:count])) for count in range(len(pieces))]
        assert found["token_logprobs"] == [-0.5] * len(tokens)
        choice = self.reply(chat(), tokenizer, tokens, context=context)
        content = choice["logprobs"]["content"]
        assert [entry["token"] for entry in content] == pieces
        assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == choice["message"]["content"]

    def test_the_bytes_are_those_of_the_token(self):
        content = self.reply(chat(), BYTES, tokens_of(BYTES, EMOJI))["logprobs"]["content"]
        assert [entry["bytes"] for entry in content] == [[byte] for byte in EMOJI]

    def test_candidates_that_are_written_alike_are_all_there(self):
        candidates = [*range(200, 220), 10_000, 10_001]
        (token,) = tokens_of(BYTES, "a")
        top = self.reply(completion(), BYTES, [token], candidates=candidates)["logprobs"]["top_logprobs"][0]
        assert len(top) == 23
        assert {"a", "token_id:10000", "token_id:10001"} < set(top)
        assert max(top, key=top.get) == "a"  # the token under the name that it has among the pieces
        tops = self.reply(chat(), BYTES, [token], candidates=candidates)["logprobs"]["content"][0]["top_logprobs"]
        assert len(tops) == 23
        assert all(entry["bytes"] for entry in tops[:20])

    def test_candidates_that_are_parts_of_characters_are_all_there(self):
        """Each alone is written as U+FFFD."""
        (token,) = tokens_of(BYTES, "a")
        candidates = tokens_of(BYTES, bytes(range(0x80, 0x94)))
        top = self.reply(completion(), BYTES, [token], candidates=candidates)["logprobs"]["top_logprobs"][0]
        assert len(top.keys() - {"a"}) == 20

    def test_a_candidate_that_is_written_as_the_token_has_another_name(self):
        special, (token,) = len(PARTS) - 1, tokens_of(PARTS, EMOJI[3:])
        whole = PARTS.convert_tokens_to_ids("ðŁĺĢ")
        tokens = [*tokens_of(PARTS, EMOJI[:3]), token]
        top = self.reply(completion(), PARTS, tokens, candidates=[whole, special])["logprobs"]["top_logprobs"][3]
        assert top == {f"token_id:{whole}": -1.0, PARTS.convert_ids_to_tokens(special): -1.0, "😀": -0.5}

    def test_the_token_is_among_its_candidates(self):
        """OpenAI's completions have one more than was asked for, if it is not one of those."""
        entry = SimpleNamespace(token_id=97, logprob=-9.0, top={98: -0.1})
        done = output("x", logprobs=[entry])
        done.pieces = ["x"]
        top = Reply(completion(), "m", SPELLING).whole([done])["choices"][0]["logprobs"]["top_logprobs"][0]
        assert top == {SPELLING.name(98): -0.1, "x": -9.0}

    def test_what_is_impossible_can_be_written_in_json(self):
        entry = SimpleNamespace(token_id=97, logprob=-inf, top={98: -inf})
        done = output("x", logprobs=[entry])
        done.pieces = ["x"]
        for request in (completion(), chat()):
            json.dumps(Reply(request, "m", SPELLING).end(0, done), allow_nan=False)


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (QueueFullError("full"), 429, "rate_limit_error", "rate_limit_exceeded"),
        (PromptTooLongError("long"), 400, "invalid_request_error", "context_length_exceeded"),
        (RequestError("empty"), 400, "invalid_request_error", None),
        (ConfigError("top_p", "less", 2), 400, "invalid_request_error", "invalid_value"),
        (RequestFailedError("a mistake"), 500, "server_error", None),
        (EngineError("dead"), 500, "server_error", None),
        (ValueError("a mistake"), 500, "server_error", None),
    ],
)
def test_errors(error, status, kind, code):
    found, body = error_reply(error)
    assert found == status
    assert body["error"] | {"message": str(error), "type": kind, "code": code} == body["error"]
