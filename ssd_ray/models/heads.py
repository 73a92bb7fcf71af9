"""What the config of a head says: a draft of a layer or so that goes on from hidden states of its target.

Served are the heads of EAGLE-3 (Li et al., 2025) in the two formats in which they are published: that of its authors
and of SGLang (a Llama's config with ``draft_vocab_size``), and that of the library speculators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ssd_ray.errors import ModelError, UnsupportedModelError
from ssd_ray.models.reach import UNSEEN

KINDS = ("llama", "qwen3")
"""Families whose layers a head may have."""

SPECULATORS = "speculators_model_type"


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """A head of EAGLE-3.

    Attributes:
        config: of its own layers; its vocabulary is the target's.
        draft_vocab_size: tokens that it may propose.
        target_hidden_size: numbers in a hidden state of its target.
        layers: after how many of the target's layers it reads; None: after 2, a half, and all but 3.
        norm_before_residual: the first layer adds to the normed state, not to the state.
        norm_before_fc: what is read is normed together first.
        fc_norm: what is read is normed first, each state for itself.
        norm_output: it goes on from its normed states.
    """

    config: PreTrainedConfig
    draft_vocab_size: int
    target_hidden_size: int
    layers: tuple[int, ...] | None = None
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False

    @property
    def states(self) -> int:
        """Hidden states of a token that it reads."""
        return 3 if self.layers is None else len(self.layers)

    def taps(self, target: PreTrainedConfig) -> tuple[int, ...]:
        """Where it reads in a target of this config.

        Raises:
            ModelError: the two do not fit each other.
        """
        text = target.get_text_config()
        count, hidden, vocab = int(text.num_hidden_layers), int(text.hidden_size), int(text.vocab_size)
        if hidden != self.target_hidden_size:
            raise ModelError(
                f"draft: the head reads hidden states of {self.target_hidden_size} numbers, the target's have {hidden}"
            )
        if self.config.vocab_size != vocab:
            raise ModelError(
                f"draft: the head reads a vocabulary of {self.config.vocab_size} tokens, the target's has {vocab}"
            )
        places = self.layers if self.layers is not None else (2, count // 2, count - 3)
        if not all(0 <= place <= count for place in places):
            raise ModelError(f"draft: the head reads after layers {list(places)} of a target that has {count}")
        return places


def parse_head(config: Mapping[str, Any]) -> Head | None:
    """What a config.json says if it is a head's; None if it is a whole model's.

    Raises:
        UnsupportedModelError: it is a head of another kind.
    """
    if SPECULATORS in config:
        return _from_speculators(config)
    names = config.get("architectures") or []
    if any("Eagle3" in name for name in names) or "draft_vocab_size" in config:
        return _from_authors(config)
    if any("Eagle" in name or "Medusa" in name for name in names):
        raise _unsupported(names[0])
    return None


def _unsupported(kind: object) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"draft: {kind} is a head of another kind; of those that read the target, EAGLE-3's work"
    )


def _from_authors(config: Mapping[str, Any]) -> Head:
    said = config.get("eagle_config") or {}
    if said.get("use_aux_hidden_state") is False:
        raise _unsupported("one that reads a single hidden state")
    if (kind := config.get("model_type", "llama")) != "llama":
        raise UnsupportedModelError(
            f"draft: the layers of this head are those of {kind!r}; in its format a Llama's work"
        )
    own = _layer_config({**config, "model_type": "llama"})
    layers = said.get("eagle_aux_hidden_state_layer_ids")  # numbers of layers whose outputs are read
    return _head(config, own, [layer + 1 for layer in layers or ()])


def _from_speculators(config: Mapping[str, Any]) -> Head:
    if config[SPECULATORS] != "eagle3":
        raise _unsupported(f"a speculator {config[SPECULATORS]!r}")
    described = config.get("transformer_layer_config") or {}
    if (kind := described.get("model_type")) not in KINDS:
        raise UnsupportedModelError(f"draft: the layers of this head are those of {kind!r}; those of {KINDS} work")
    own = _layer_config(described)
    layers = config.get("eagle_aux_hidden_state_layer_ids")  # how many layers come before
    return _head(config, own, layers or ())


def _head(config: Mapping[str, Any], own: PreTrainedConfig, layers: Sequence[int]) -> Head:
    """What both formats call alike."""
    flags = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    return Head(
        config=own,
        draft_vocab_size=config.get("draft_vocab_size") or own.vocab_size,
        target_hidden_size=config.get("target_hidden_size") or own.hidden_size,
        layers=tuple(layers) or None,
        **{name: bool(config.get(name)) for name in flags},
    )


def _layer_config(described: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of a head's own layers. There is no hidden state before the first token, which heads are trained
    without: nobody sees it."""
    fields = {name: value for name, value in described.items() if name not in ("architectures", "transformers_version")}
    config = AutoConfig.for_model(**fields)
    setattr(config, UNSEEN, 1)
    return config
