"""What a model is, what it takes and what a pair of them may bring, before any weight is read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from transformers import PreTrainedConfig

from ssd_ray.config import MAX_LOOKAHEAD
from ssd_ray.models.info import UNLIMITED, ModelInfo, count_parameters, model_info, sampling_defaults
from ssd_ray.models.quantize import Kind
from ssd_ray.models.reach import Sight
from ssd_ray.models.recurrent import bytes_of_states
from ssd_ray.models.sources import Role, checkpoint_dtype, find_source, in_our_words, read_config
from ssd_ray.saguaro.factors import expected_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """A model in words and numbers.

    Attributes:
        source: its folder or hub id.
        kind: what transformers calls the architecture.
        info: what its config says.
        parameters: numbers in its weights.
        weight_bytes: what they take in the checkpoint's dtype, or quantised.
        dtype: that dtype.
        quantised: how they are quantised, by the checkpoint or when they are loaded; None if they are not.
        layers: how many there are.
        sees: how far back layers see.
        experts: how many a token gets of how many; empty if there are none.
        sampling: what its generation config says of sampling.
    """

    source: str
    kind: str
    info: ModelInfo
    parameters: int
    weight_bytes: int
    dtype: str
    quantised: str | None
    layers: int
    sees: str
    experts: str
    sampling: dict[str, float | int]

    def state_bytes(self, rows: int, tokens: int) -> int:
        """States of so many sequences of so many tokens, all that are kept."""
        return bytes_of_states(self.info.state_bytes, rows, tokens)

    def kv_bytes(self, tokens: int) -> int:
        """KV of a sequence of so many tokens, without what lies behind windows."""
        return sum(each.slot_bytes * min(tokens, each.reach.size or tokens) for each in self.info.kept)


def describe(
    path: str | None, *, role: Role = "target", quantize: Kind | None = None, trust_remote_code: bool = False
) -> Description:
    """Describe a model from its config; arguments as in :func:`~ssd_ray.models.loader.load_runner`.

    Raises:
        ModelError: no such model.
        UnsupportedModelError: its architecture cannot work here.
    """
    info = model_info(path, role=role, quantize=quantize, trust_remote_code=trust_remote_code)
    source = find_source(path, role)
    with in_our_words(role, source):
        config = read_config(source, trust_remote_code)
        text, dtype = config.get_text_config(), checkpoint_dtype(config)
        parameters = count_parameters(config, trusted=trust_remote_code)
        return Description(
            source=source,
            kind=config.model_type,
            info=info,
            parameters=parameters,
            weight_bytes=info.parameter_bytes or parameters * dtype.itemsize,
            dtype=str(dtype).removeprefix("torch."),
            quantised=info.quantised,
            layers=text.num_hidden_layers,
            sees=_sees(Sight.of(config, info.max_length or UNLIMITED)),
            experts=_experts(text),
            sampling=sampling_defaults(path, role=role),
        )


def _sees(sight: Sight) -> str:
    count = Counter(sight.of_layers)
    words = []
    for index, reach in enumerate(sight.reaches):
        size = f"chunks of {reach.size:,}" if reach.chunked else f"{reach.size:,} tokens"
        what = size if reach.size else "all"
        words.append(what if len(count) == 1 else f"{count[index]} layers {what}")
    return ", ".join(words)


def _experts(text: PreTrainedConfig) -> str:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    number = next((each for name in names if isinstance(each := getattr(text, name, None), int) and each > 1), 0)
    chosen = getattr(text, "num_experts_per_tok", None)
    return f"{chosen or 1} of {number}" if number else ""


def at_best(acceptance: float, step: float) -> tuple[float, float]:
    """How much faster than plain decoding speculation can be: one after the other, and with the draft's work hidden
    behind verifications.

    Drafting k tokens takes k steps, which come before the verification or beside it.

    Args:
        acceptance: probability that a token is accepted when it is reached.
        step: what a draft step takes of a verification.
    """
    gains = [expected_tokens(acceptance, k) for k in range(MAX_LOOKAHEAD + 1)]
    waiting = max(gain / (1.0 + k * step) for k, gain in enumerate(gains))
    hidden = max(gain / max(1.0, k * step) for k, gain in enumerate(gains))
    return waiting, hidden
