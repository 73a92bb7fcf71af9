"""Where a head finds the hidden state before each token, and leaves its own: beside the KV, by address.

They are no arguments of its forward, so that transformers' machinery and ours run a head like any other model; reading
and keeping them are one call each in a recorded forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutput

from ssd_ray.models.replay import opaque
from ssd_ray.models.slots import Window
from ssd_ray.models.taps import of_tokens


@dataclass(slots=True)
class Memory:
    """The states of all slots.

    Attributes:
        states: [slots of the pool, hidden], by address.
        before: int64, by address of a token: where the state before it lies.
        after: int64, by address of a token: where its own state goes.
        window: where a forward writes; addresses are those in its first pool.
    """

    states: Tensor
    before: Tensor
    after: Tensor
    window: Window


class HeadModel(PreTrainedModel):
    """A head as a causal LM.

    Attributes:
        body: all but the output layer. It has the attribute ``memory``; without one the states before all tokens are
            zero.
        lm_head: the output layer, of the tokens that it proposes.
        reads: numbers of its target's that it reads of each token.
    """

    _supports_attention_backend = True
    _supports_sdpa = True

    body: Any
    lm_head: Any
    reads: int

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # its layers are transformers' own

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    @property
    def proposed(self) -> Tensor:
        """The target's tokens for the head's own, int64 [draft vocabulary]."""
        return torch.arange(self.config.vocab_size, device=self.device)

    def combine(self, states: Tensor) -> Tensor:
        """The state to go on from, [tokens, hidden], of the target's, [tokens, ``reads``]: these, as they are."""
        return states

    def get_decoder(self) -> Any:
        """All but the output layer."""
        return self.body

    def get_output_embeddings(self) -> Any:
        """The output layer."""
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Logits over the tokens that it proposes; arguments as transformers has them."""
        output = self.body(input_ids, attention_mask, position_ids, past_key_values, **kwargs)
        return CausalLMOutput(logits=self.lm_head(output.last_hidden_state))


@opaque(lambda tokens, memory: (tokens,))
def states_before(tokens: Tensor, memory: Memory | None) -> Tensor:
    """The states before the tokens of a forward, whose embeddings are [R, T, hidden]; of padding zero."""
    states = torch.zeros_like(tokens)
    if memory is not None:
        read = memory.states[memory.before[memory.window.written[0]]]
        states[:, : len(read) // len(states)] = read.view(len(states), -1, read.shape[-1])
    return states


@opaque(lambda states, memory: (states,))
def keep_after(states: Tensor, memory: Memory | None) -> None:
    """Keep the states [R, T, hidden] after the tokens of a forward."""
    if memory is not None:
        written = memory.window.written[0]
        memory.states.index_copy_(0, memory.after[written], of_tokens(states, written))


def mask_of_text(tokens: Tensor) -> Tensor:
    """The mask of a text from its beginning, additive [1, 1, T, T], for embeddings [R, T, hidden]: nobody but the first
    token, before which there is no state, sees that one."""
    count = tokens.shape[1]
    places = torch.arange(count, device=tokens.device)
    seen = (places <= places[:, None]) & (places >= places[:, None].clamp(max=1))
    hidden = torch.full((), torch.finfo(tokens.dtype).min, dtype=tokens.dtype, device=tokens.device)
    return torch.where(seen, torch.zeros_like(hidden), hidden)[None, None]
