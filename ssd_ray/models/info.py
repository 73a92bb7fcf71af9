"""What is known of a model before its weights are read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from ssd_ray.config import MTP_DRAFT
from ssd_ray.errors import UnsupportedModelError, VocabularyMismatchError
from ssd_ray.models.adapters import adapter_fingerprint, adapter_folder, check_adapter
from ssd_ray.models.calibration import cache_path, keep, machine_name, read
from ssd_ray.models.checkpoint import checkpoint_folder, fingerprint, is_gguf
from ssd_ray.models.formats import checkpoint_format, is_widened, refuse_format
from ssd_ray.models.mtp import mtp_config
from ssd_ray.models.probe import probe_layers
from ssd_ray.models.published import check_mtp
from ssd_ray.models.quantize import Kind, quantised_bytes, refuse_kind
from ssd_ray.models.reach import Reach, Sight
from ssd_ray.models.recurrent import shape_kept, states_of, what_is_kept
from ssd_ray.models.slots import ALL
from ssd_ray.models.sources import (
    Role,
    check_source,
    checkpoint_dtype,
    find_source,
    in_our_words,
    place,
    read_config,
    read_head,
    silence,
    source_bytes,
)
from ssd_ray.models.support import is_recurrent, max_positions, refuse_unsupported
from ssd_ray.models.taps import LAST
from ssd_ray.models.translation import LEAST_SHARED, Translation

CPU = torch.device("cpu")

UNLIMITED = 1 << 30
"""Tokens of a text where a config sets no limit."""

SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Fields of a generation config that requests heed where they say nothing, and what they are called here."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What layers keep of a token that see equally far.

    Attributes:
        reach: how far back.
        slot_bytes: K and V of one token over these layers.
    """

    reach: Reach
    slot_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """What a model's config.json says, before any weight is read.

    Attributes:
        vocab_size: entries of the embedding; padding beyond the tokenizer's included.
        max_length: positions that the model can take, or None if its config sets no limit.
        eos_token_ids: tokens that end a text; see also :func:`end_tokens`.
        parameter_bytes: what the weights take; 0 if their files are not on this machine yet.
        kv_bytes_per_slot: K and V of one token over all layers, in the checkpoint's dtype.
        kept: the same for each reach that layers have.
        state_bytes: states of all recurrent layers after a token; 0 if there are none.
        quantised: how the weights are, by the checkpoint or when they are loaded; None if they are not.
    """

    vocab_size: int
    max_length: int | None
    eos_token_ids: tuple[int, ...]
    parameter_bytes: int
    kv_bytes_per_slot: int
    kept: tuple[Kept, ...] = ()
    state_bytes: int = 0
    quantised: str | None = None


def model_info(
    path: str | None,
    *,
    role: Role = "target",
    quantize: Kind | None = None,
    device: torch.device = CPU,
    trust_remote_code: bool = False,
    taps: int = 0,
) -> ModelInfo:
    """Describe a model from its config.json alone; arguments as in :func:`load_runner`, and at how many places a head
    reads it.

    Raises:
        ModelError: no such model.
        UnsupportedModelError: its architecture cannot work here.
    """
    source = find_source(path, role)
    with in_our_words(role, source):
        if role == "target" and read_head(source) is not None:
            raise UnsupportedModelError(
                f"target: {source} is a head: it reads hidden states of another model, its target"
            )
        config = read_config(source, trust_remote_code)
        refuse_unsupported(config, role, trusted=trust_remote_code)
        length, dtype, how = max_positions(config), checkpoint_dtype(config), kind_for(config, quantize)
        kept = what_layers_keep(config, dtype, length or UNLIMITED, trusted=trust_remote_code)
        return ModelInfo(
            vocab_size=config.get_text_config().vocab_size,
            max_length=length,
            eos_token_ids=_eos_token_ids(source, config),
            parameter_bytes=weight_bytes(source, config, dtype, quantize=how, device=device, trusted=trust_remote_code),
            kv_bytes_per_slot=sum(each.slot_bytes for each in kept),
            kept=tuple(with_taps(kept, config, dtype, taps)),
            state_bytes=state_bytes(config, dtype, trusted=trust_remote_code),
            quantised=how or checkpoint_format(config),
        )


def mtp_info(target: str | None, *, trust_remote_code: bool = False) -> ModelInfo:
    """Describe the head for multi-token prediction in a target's checkpoint, of which :func:`head_taps` knows."""
    source = find_source(target, "target")
    with in_our_words("draft", source):
        config = mtp_config(read_config(source, trust_remote_code))
        length, dtype = max_positions(config), checkpoint_dtype(config)
        kept = tuple(what_layers_keep(config, dtype, length or UNLIMITED, trusted=trust_remote_code))
        here = source_bytes(source) > 0
        return ModelInfo(
            vocab_size=config.vocab_size,
            max_length=length,
            eos_token_ids=(),
            parameter_bytes=count_parameters(config, trusted=trust_remote_code) * dtype.itemsize if here else 0,
            kv_bytes_per_slot=sum(each.slot_bytes for each in kept),
            kept=kept,
        )


def check_files(path: str | None, *, role: Role = "target") -> None:
    """Look whether the weights of a model are there and whole, without reading them.

    Raises:
        ModelError: naming the file that is not.
    """
    source = find_source(path, role)
    with in_our_words(role, source):
        check_source(source)


def model_fingerprint(path: str | None, *, role: Role = "target", adapter: str | None = None) -> tuple[str, str]:
    """Digests of a model's config and weights, its adapter's included, by which two machines see whether theirs is the
    same; empty for what is not on this one; see :func:`~ssd_ray.models.checkpoint.fingerprint`.

    Raises:
        ModelError: no such folder.
    """
    source = find_source(path, role)
    with in_our_words(role, source):
        folder = checkpoint_folder(source)
        found = fingerprint(folder) if folder else ("", "")
    if adapter is None:
        return found
    config, weights = adapter_fingerprint(adapter_folder(adapter))
    return found[0] and found[0] + config, found[1] and found[1] + weights


def load_tokenizer(path: str | None, *, role: Role = "target", trust_remote_code: bool = False) -> Any:
    """Load the tokenizer that lies beside a model.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    source = find_source(path, role)
    with in_our_words(role, source):
        return AutoTokenizer.from_pretrained(**place(source), trust_remote_code=trust_remote_code)


def sampling_defaults(path: str | None, *, role: Role = "target") -> dict[str, Any]:
    """What a model's generation config says of sampling, by the names of :class:`~ssd_ray.config.SamplingParams`."""
    said = _generation_config(find_source(path, role))
    return {ours: said[theirs] for theirs, ours in SAMPLING.items() if said.get(theirs) is not None}


def end_tokens(info: ModelInfo, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a text: those of the model's configs, and the tokenizer's own end token."""
    own = tokenizer.eos_token_id
    return tuple(sorted({*info.eos_token_ids, *([] if own is None else [own])}))


def check_pair(target: str | None, draft: str | None, *, trust_remote_code: bool = False) -> None:
    """Check that two models share one vocabulary.

    Tokenizers decide where both models have one: the same strings under the same ids. The embeddings may then differ in
    padding. Without tokenizers the sizes of the vocabularies have to be equal.

    Raises:
        VocabularyMismatchError: they do not.
        ModelError: a model is not there.
    """
    _require_one_vocabulary(target, draft, _tokenizers(target, draft, trust_remote_code), trust_remote_code)


def translation_between(
    target: str | None, draft: str | None, *, trust_remote_code: bool = False
) -> Translation | None:
    """What the tokens of a target are on a draft of another vocabulary; None if that is the same.

    Raises:
        VocabularyMismatchError: a model has no tokenizer, or they share too little.
        ModelError: a model is not there.
    """
    tokenizers = _tokenizers(target, draft, trust_remote_code)
    try:
        _require_one_vocabulary(target, draft, tokenizers, trust_remote_code)
        return None
    except VocabularyMismatchError:
        if None in tokenizers:
            raise
    size = model_info(target, trust_remote_code=trust_remote_code).vocab_size
    translation = Translation.between(*tokenizers, size)
    if translation.shared < LEAST_SHARED:
        raise VocabularyMismatchError(
            f"draft: its tokenizer is not the target's, of whose tokens it has {translation.shared:.0%}; a draft of "
            f"another vocabulary has at least {LEAST_SHARED:.0%}"
        )
    return translation


Tokenizers = tuple[Any, Any]
"""The target's and the draft's; None where a model has none."""


def _require_one_vocabulary(target: str | None, draft: str | None, tokenizers: Tokenizers, trusted: bool) -> None:
    if None in tokenizers:
        ours, theirs = (
            model_info(path, role=role, trust_remote_code=trusted).vocab_size for path, role in _pair(target, draft)
        )
        if ours != theirs:
            raise VocabularyMismatchError(
                f"draft: its vocabulary has {theirs} tokens, the target's has {ours}; a pair shares one"
            )
        return
    own, other = (tokenizer.get_vocab() for tokenizer in tokenizers)
    if own != other:
        most = max(len(own), len(other))
        raise VocabularyMismatchError(
            f"draft: its tokenizer is not the target's: {most - len(own.items() & other.items())} of {most} entries "
            "differ; a pair shares one vocabulary"
        )


def _tokenizers(target: str | None, draft: str | None, trusted: bool) -> Tokenizers:
    own, other = (_tokenizer(path, role, trusted) for path, role in _pair(target, draft))
    return own, other


def _pair(target: str | None, draft: str | None) -> tuple[tuple[str | None, Role], ...]:
    return (target, "target"), (draft, "draft")


def _tokenizer(path: str | None, role: Role, trusted: bool) -> Any:
    """The tokenizer beside a model; None if there is none."""
    source = find_source(path, role)
    if os.path.isdir(source) and not any(Path(source).glob("*tokenizer*")) and not any(Path(source).glob("vocab.*")):
        return None
    return load_tokenizer(path, role=role, trust_remote_code=trusted)


def _generation_config(source: str) -> dict[str, Any]:
    """What a model's generation_config.json says; nothing if there is none."""
    if is_gguf(source):
        return {}
    # Imported here: transformers loads generation lazily, and actors never need it.
    from transformers import GenerationConfig

    try:
        with silence():
            found = GenerationConfig.from_pretrained(source, local_files_only=os.path.isdir(source))
    except (OSError, ValueError):
        return {}
    said: dict[str, Any] = found.to_diff_dict()
    return said


def _eos_token_ids(source: str, config: PreTrainedConfig) -> tuple[int, ...]:
    """End tokens of the generation config where there is one (chat models list more there), else of the config."""
    found = _generation_config(source).get("eos_token_id")
    found = config.get_text_config().eos_token_id if found is None else found
    return () if found is None else (found,) if isinstance(found, int) else tuple(found)


def kind_for(config: PreTrainedConfig, quantize: Kind | None) -> Kind | None:
    """How the weights of a checkpoint are quantised when they are loaded: not those that are already."""
    return None if checkpoint_format(config) else quantize


def refuse_weights(
    path: str | None,
    *,
    role: Role = "target",
    quantize: Kind | None = None,
    device: torch.device = CPU,
    trust_remote_code: bool = False,
) -> None:
    """Refuse a checkpoint, or a way to quantise it, for which this device or installation lacks something.

    Raises:
        UnsupportedModelError: the checkpoint is quantised in a way that needs it.
        ConfigError: ``quantize`` does.
    """
    source = find_source(path, role)
    with in_our_words(role, source):
        config = read_config(source, trust_remote_code)
        refuse_format(config, role, device)
        if (how := kind_for(config, quantize)) is not None:
            refuse_kind(how, device)


def check_adapter_of(adapter: str | None, path: str | None, *, trust_remote_code: bool = False) -> None:
    """Look whether an adapter can be merged into the target's weights, without reading these.

    Raises:
        ModelError: there is none, or it is for another model.
        UnsupportedModelError: it cannot be merged, or not into weights that are quantised.
        ConfigError: the package that does it is not installed.
    """
    if adapter is None:
        return
    source, folder = find_source(path, "target"), adapter_folder(adapter)
    with in_our_words("target", source):
        config = read_config(source, trust_remote_code)
        if (method := checkpoint_format(config)) is not None:
            raise UnsupportedModelError(f"adapter: it cannot be merged into weights that are quantised by {method}")
        check_adapter(folder, _outline(config, trust_remote_code))


def weight_bytes(
    source: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    quantize: Kind | None = None,
    device: torch.device = CPU,
    trusted: bool = False,
) -> int:
    """What a model's weights take in a dtype, or quantised, by its files; 0 if these are not here."""
    size = source_bytes(source)
    if quantize is not None:
        return quantised_bytes(_outline(config, trusted), quantize, dtype) if size else 0
    if is_gguf(source) or is_widened(config, device):
        return count_parameters(config, trusted=trusted) * dtype.itemsize
    # In a checkpoint that is quantised, what has a dtype is the smaller part.
    return size if checkpoint_format(config) else size * dtype.itemsize // checkpoint_dtype(config).itemsize


def count_parameters(config: PreTrainedConfig, *, trusted: bool = False) -> int:
    """Numbers in a model's weights."""
    return sum(weight.numel() for weight in _outline(config, trusted).parameters())


def _outline(config: PreTrainedConfig, trusted: bool) -> PreTrainedModel:
    """A model without weights. In half precision: some operations exist for no other dtype on this device."""
    with torch.device("meta"), silence():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            deepcopy(config), dtype=torch.bfloat16, trust_remote_code=trusted
        )  # which notes the dtype in the config
        model.tie_weights()
    return model


def kv_bytes(config: PreTrainedConfig, dtype: torch.dtype, *, trusted: bool = False) -> int:
    """Bytes of one slot over all layers."""
    return sum(each.slot_bytes for each in what_layers_keep(config, dtype, UNLIMITED, trusted=trusted))


def with_taps(kept: Sequence[Kept], config: PreTrainedConfig, dtype: torch.dtype, taps: int) -> list[Kept]:
    """What is kept of a token with its hidden states at so many places, which a target keeps where layers see all."""
    own = taps * int(config.get_text_config().hidden_size) * dtype.itemsize
    whole = next((index for index, each in enumerate(kept) if each.reach.whole), 0)
    return [replace(each, slot_bytes=each.slot_bytes + (index == whole) * own) for index, each in enumerate(kept)]


def head_taps(target: str | None, draft: str | None, *, trust_remote_code: bool = False) -> tuple[int, ...]:
    """Where a draft reads hidden states of its target, as :class:`~ssd_ray.models.taps.Taps` takes it; empty if it is a
    whole model.

    Raises:
        ModelError: a head that was made for another target.
        UnsupportedModelError: a head of a kind that does not work.
    """
    if draft is None:  # the bundled one
        return ()
    if draft == MTP_DRAFT:
        source = find_source(target, "target")
        with in_our_words("target", source):
            check_mtp(source, read_config(source, trust_remote_code))
        return (LAST,)
    source = find_source(draft, "draft")
    with in_our_words("draft", source):
        head = read_head(source)
    if head is None:
        return ()
    source = find_source(target, "target")
    with in_our_words("target", source):
        return head.taps(read_config(source, trust_remote_code))


def state_bytes(config: PreTrainedConfig, dtype: torch.dtype, *, trusted: bool = False) -> int:
    """Bytes of all recurrent layers' states after a token; 0 if there are none."""
    return _what_is_kept(config, dtype, trusted).state


def what_layers_keep(config: PreTrainedConfig, dtype: torch.dtype, length: int, *, trusted: bool = False) -> list[Kept]:
    """What a model without weights keeps of a token, for each reach that its layers have in texts of ``length`` tokens.
    ``trusted`` says whether code that comes with a model may run."""
    numbers = _what_is_kept(config, dtype, trusted).numbers
    # States cannot be taken up anywhere, so all must be there from which they are computed again.
    sight = ALL if is_recurrent(config) else Sight.of(config, length)
    reaches = [*sight.of_layers, *[0] * len(numbers)]
    sums = [0] * len(sight.reaches)
    for reach, number in zip(reaches, numbers, strict=False):
        sums[reach] += number * dtype.itemsize
    return [Kept(reach, number) for reach, number in zip(sight.reaches, sums, strict=True)]


class _Outlined(msgspec.Struct, frozen=True):
    """Numbers that each layer keeps of a token, and bytes of all states after one."""

    numbers: list[int]
    state: int


def _what_is_kept(config: PreTrainedConfig, dtype: torch.dtype, trusted: bool) -> _Outlined:
    path = cache_path(machine_name("what is kept", config.to_json_string(), str(dtype), trusted))
    found = read(path, _Outlined)
    if found is None:
        found = _outlined(config, dtype, trusted)
        keep(path, found)
    return found


def _outlined(config: PreTrainedConfig, dtype: torch.dtype, trusted: bool) -> _Outlined:
    outline, state = _outline(config, trusted), 0
    try:
        if is_recurrent(config):
            layers = what_is_kept(outline)
            state = sum(
                tensor.numel() * (dtype if tensor.dtype == outline.dtype else tensor.dtype).itemsize
                for tensor in states_of(layers)
            )
            shapes = [shape for layer in layers if (shape := shape_kept(layer)) is not None]
        else:
            shapes = probe_layers(outline)
    except UnsupportedModelError as error:
        if error.__cause__ is None:  # it ran, and keeps something else
            raise
        return _Outlined(_usual_numbers_kept(config), 0)  # it looks at values, which are not there
    return _Outlined([shape.heads * (shape.key_dim + shape.value_dim) for shape in shapes] or [1], state)


def _usual_numbers_kept(config: PreTrainedConfig) -> list[int]:
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return [int(2 * kv_heads * head_dim)] * text.num_hidden_layers
