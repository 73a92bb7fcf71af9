"""Heads for multi-token prediction that come in their target's own checkpoint, as in DeepSeek V3 or Qwen 3 Next.

Such a head is one more layer of the target's kind. It reads the target's states behind the last norm, joins each with
the embedding of the next token, and shares embedding and output layer with the target. So here it is a model of that
family with one layer, whose embeddings are joined with states on their way in.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ssd_ray.errors import ModelError
from ssd_ray.models.checkpoint import few
from ssd_ray.models.graphs import cache_name
from ssd_ray.models.memory import HeadModel, Memory, keep_after, mask_of_text, states_before
from ssd_ray.models.reach import UNSEEN

QWEN = "mtp."
"""What begins the names of a head's weights in the checkpoints of Qwen 3 Next and 3.5."""

PARTS = {
    "enorm.": "enorm.",
    "pre_fc_norm_embedding.": "enorm.",
    "hnorm.": "hnorm.",
    "pre_fc_norm_hidden.": "hnorm.",
    "eh_proj.": "eh_proj.",
    "fc.": "eh_proj.",
}
"""How the checkpoints call what is not a part of the layer, and how it is called here."""

WHOLE = {
    "shared_head.norm.": "model.norm.",
    "norm.": "model.norm.",
    "shared_head.head.": "lm_head.",
    "embed_tokens.": "model.embed_tokens.",
    "layers.0.": "model.layers.0.",
}
"""The same for the parts of the model of one layer."""


def prefixes(target: PreTrainedConfig) -> tuple[str, ...]:
    """How the names of a head's weights may begin in a target's checkpoint."""
    return f"model.layers.{target.get_text_config().num_hidden_layers}.", QWEN


def mtp_config(target: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the model of one layer that a head is."""
    config = deepcopy(target.get_text_config())
    config.num_hidden_layers = 1
    one = {"layer_types": ["full_attention"], "mlp_layer_types": ["sparse"], "first_k_dense_replace": 0}
    for name, value in (one | {"mlp_only_layers": []}).items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    if hasattr(config, "quantization_config"):  # which says how the files are; weights in few bits are refused
        del config.quantization_config
    config.tie_word_embeddings = False
    setattr(config, UNSEEN, 1)
    return config


class MtpHead(HeadModel):
    """A head around a model of one layer."""

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__(base.config)
        self.body = MtpBody(base.get_decoder())
        self.lm_head = base.get_output_embeddings()
        self.reads = base.config.hidden_size

    def get_input_embeddings(self) -> nn.Module:
        """Of the target's tokens."""
        embedding: nn.Module = self.body.base.get_input_embeddings()
        return embedding


class MtpBody(nn.Module):
    """All of a head but its output layer."""

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        config, norm = base.config, type(base.norm)
        self.base = base
        self.enorm = norm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = norm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.memory: Memory | None = None
        self._cache_name = cache_name(base)

    @property
    def dtype(self) -> torch.dtype:
        """That of its weights."""
        return self.eh_proj.weight.dtype

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The normed states, from which it also goes on; arguments as transformers has them."""
        tokens = self.base.get_input_embeddings()(input_ids)
        joined = torch.cat([self.enorm(tokens), self.hnorm(states_before(tokens, self.memory))], -1)
        output = self.base(
            inputs_embeds=self.eh_proj(joined),
            attention_mask=mask_of_text(tokens) if attention_mask is None else attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{self._cache_name: past_key_values},
        )
        keep_after(output.last_hidden_state, self.memory)
        return output


def make_mtp(config: PreTrainedConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> MtpHead:
    """A head of its weights.

    Args:
        config: as :func:`mtp_config` made it.
        weights: by their names behind the prefix, with the target's ``embed_tokens.weight`` and
            ``shared_head.head.weight``.

    Raises:
        ModelError: weights are missing.
    """
    if coarse := [name for name, weight in weights.items() if weight.dtype.itemsize < 2 and weight.is_floating_point()]:
        raise ModelError(f"draft: the target's head is held in eight bits, which is not read here: {few(coarse)}")
    own = {renamed: weight for name, weight in weights.items() if (renamed := _renamed(name, PARTS)) is not None}
    state = {
        _renamed(name, WHOLE) or f"model.layers.0.{name}": weight
        for name, weight in weights.items()
        if _renamed(name, PARTS) is None
    }
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    base, found = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True)
    head = MtpHead(base)
    wanted = {name for name in head.body.state_dict() if not name.startswith("base.")}
    if missing := [*found["missing_keys"], *(wanted - own.keys())]:
        raise ModelError(f"draft: the target's head lacks weights: {few(missing)}")
    head.body.load_state_dict(own, strict=False)
    made: MtpHead = head.to(dtype)
    return made


def _renamed(name: str, names: Mapping[str, str]) -> str | None:
    return next((ours + name.removeprefix(theirs) for theirs, ours in names.items() if name.startswith(theirs)), None)
