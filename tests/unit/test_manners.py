"""What a model's own files say about how it likes to be used: sampling, beginnings, templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ssd_ray import cli
from ssd_ray.chat import Template, chat_prompt
from ssd_ray.cluster.preflight import check, default_sampling
from ssd_ray.config import EngineConfig, SamplingParams
from ssd_ray.errors import ConfigError, RequestError
from tests.support.tiny import save_model, tiny_model, tiny_tokenizer

OWN = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05, "max_new_tokens": 77}
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    "{% if enable_thinking %}think {% endif %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", tiny_model())


def say(folder: Path, **values: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps(values))


def test_a_request_that_says_nothing_is_sampled_as_the_model_likes(folder: Path) -> None:
    say(folder, **OWN, do_sample=True, eos_token_id=[0, 5])
    own = SamplingParams(temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.05, max_tokens=77)
    models = check(EngineConfig(target=str(folder), method="ar"))
    assert models.sampling == own
    assert models.end_tokens == (0, 5)


def test_none_leaves_the_end_tokens_alone(folder: Path) -> None:
    say(folder, **OWN, eos_token_id=[0, 5])
    models = check(EngineConfig(target=str(folder), method="ar", generation_config="none"))
    assert models.sampling == SamplingParams()
    assert models.end_tokens == (0, 5)


def test_a_value_that_sampling_does_not_take_is_named(folder: Path) -> None:
    say(folder, temperature=-1.0)
    with pytest.raises(ConfigError, match=r"generation_config: expected 'none', since the model's temperature is not "):
        default_sampling(EngineConfig(target=str(folder)))
    assert default_sampling(EngineConfig(target=str(folder), generation_config="none")) == SamplingParams()


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        ([], {"temperature": 0.6, "top_k": 20}),
        (["--temperature", "1.0"], {"temperature": 1.0, "top_k": 20}),
        (["--generation-config", "none"], {}),
    ],
)
def test_on_the_command_line_flags_come_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], want: dict[str, float]
) -> None:
    say(folder, temperature=0.6, top_k=20)
    seen: list[SamplingParams] = []
    monkeypatch.setattr(cli, "_generate_file", lambda config, params, *rest: seen.append(params))
    arguments = ["generate", "--target", str(folder), "--prompt-file", "x.txt", "--max-tokens", "5", *flags]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert seen == [SamplingParams(**want, max_tokens=5)]


def test_a_text_begins_once(folder: Path) -> None:
    tokenizer = tiny_tokenizer(96)
    tokenizer.bos_token = "<|end|>"
    tokenizer.add_bos_token = True
    plain = tokenizer("Hi")["input_ids"]
    tokenizer.save_pretrained(folder)
    models = check(EngineConfig(target=str(folder), method="ar"))
    begun = models.prompt("Hi")
    assert models.prompt("<|end|>Hi") == [0, *plain[-2:]]
    assert begun[-2:] == plain[-2:]
    assert models.prompt("<|end|><|end|>Hi").count(0) < 3


def test_a_token_beyond_the_embedding_is_named(folder: Path) -> None:
    tokenizer = tiny_tokenizer(96)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(folder)
    models = check(EngineConfig(target=str(folder), method="ar"))
    with pytest.raises(
        RequestError, match="a token '<tool>', 96, for which the model, with 96 tokens, has no embedding"
    ):
        models.prompt("Hi <tool>")


class TestTemplates:
    @staticmethod
    def written(template: Template, **options: str) -> str:
        tokenizer = tiny_tokenizer(96)
        tokenizer.chat_template = TEMPLATE
        return tokenizer.decode(chat_prompt(tokenizer, MESSAGES, template))

    def test_arguments_reach_it(self) -> None:
        assert self.written(Template()) == "user:Hi;assistant:So;a:"
        assert self.written(Template({"enable_thinking": True})) == "user:Hi;assistant:So;think a:"

    def test_it_may_end_without_an_opening(self) -> None:
        assert self.written(Template(opens=False)) == "user:Hi;assistant:So;"

    def test_the_last_message_may_be_gone_on_with(self) -> None:
        assert self.written(Template(opens=False, goes_on=True)) == "user:Hi;assistant:So"
        with pytest.raises(RequestError, match="continue_final_message: expected add_generation_prompt=False"):
            self.written(Template(goes_on=True))

    def test_what_is_ours_to_say_is_no_argument(self) -> None:
        with pytest.raises(RequestError, match="chat_template_kwargs: expected arguments of the template"):
            self.written(Template({"tokenize": False}))

    def test_without_a_template_there_are_lines(self) -> None:
        tokenizer = tiny_tokenizer(96)
        assert chat_prompt(tokenizer, MESSAGES) == "user: Hi\nassistant: So\nassistant:"
        assert chat_prompt(tokenizer, MESSAGES, Template(opens=False)) == "user: Hi\nassistant: So\n"
        assert chat_prompt(tokenizer, MESSAGES, Template(opens=False, goes_on=True)) == "user: Hi\nassistant: So"
        with pytest.raises(RequestError, match="no chat template"):
            chat_prompt(tokenizer, MESSAGES, Template({"enable_thinking": True}))
