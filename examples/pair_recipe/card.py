"""The model card: what the pair is, what it was trained on and under which licences, and what it scores."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from pair_recipe.corpus import Source

CARD = """\
# The bundled pair

A target and a draft that continue Python code, small enough to ship and good enough to show speculative decoding at
work. They exist for tests, benchmarks and first steps; do not expect a useful programmer.

| | target | draft |
|---|---|---|
{models}

Both are stock `transformers` LlamaForCausalLM folders in bfloat16 with tied embeddings and rotary positions up to
{context} tokens, and share one byte-level BPE vocabulary of {vocabulary} tokens that can spell every byte.
`<|endoftext|>` (id 0) separates documents and is the only special token.

## Training

Made by `examples/train_pair.py`, which is the whole recipe.

{training}

## Figures

On the held-out prompts in `prompts/` ({prompts} files, at most 1,500 tokens each), with the exported bfloat16 weights.
Losses are in nats a token. Tokens a round are the mean number of tokens that one verification yields when the target
continues each prompt from its first {prefix} tokens for {written} tokens; the most is lookahead + 1.

{figures}

A model of this size soon repeats itself when it writes greedily, and loops are easy to guess: the figures at
temperature 1 are the sober ones.

## Sources and licences

{summary}

Generated tables, near-copies of other files and files that resemble a held-out prompt were left out, and so were
leading comment blocks. Licences are given as the packages declare them; the sources remain under these licences. The
weights are published under Apache-2.0, the licence of this project.

| package | declared licence | files | kB |
|---|---|---|---|
{sources}

## Held-out prompts

The beginnings of files that were not trained on. They are shipped as text, each under the licence of its package.

| file | from | declared licence |
|---|---|---|
{held_out}
"""


def table(rows: list[tuple[Any, ...]]) -> str:
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |" for row in rows)


def model_rows(target: Any, draft: Any) -> list[tuple[Any, ...]]:
    pair = (target, draft)
    return [
        ("parameters", *(f"{sum(p.numel() for p in m.parameters()):,}" for m in pair)),
        ("layers", *(m.config.num_hidden_layers for m in pair)),
        ("hidden, intermediate", *(f"{m.config.hidden_size}, {m.config.intermediate_size}" for m in pair)),
        ("heads, key/value heads", *(f"{m.config.num_attention_heads}, {m.config.num_key_value_heads}" for m in pair)),
    ]


def figure_rows(figures: dict[str, Any]) -> str:
    scores = [
        ("held-out loss of the target", figures["target_loss"]),
        ("held-out loss of the draft", figures["draft_loss"]),
        ("top-1 agreement on held-out text", figures["agreement_on_held_out_text"]),
    ]
    lookaheads = list(figures["greedy"]["tokens_per_round"])
    rounds = [
        (label, figures[key]["acceptance"], *(figures[key]["tokens_per_round"][k] for k in lookaheads))
        for label, key in (("greedy", "greedy"), ("temperature 1, coupled", "temperature_1"))
    ]
    head = ("sampling", "accepted of the target's text", *(f"tokens a round, lookahead {k}" for k in lookaheads))
    return "\n".join(
        ["| figure | value |", "|---|---|", table(scores), "", table([head]), "|---" * len(head) + "|", table(rounds)]
    )


def source_rows(sources: list[Source]) -> list[tuple[Any, ...]]:
    packages: dict[tuple[str, str], list[int]] = defaultdict(list)
    for source in sources:
        packages[source.package, source.licence].append(len(source.text))
    biggest_first = sorted(packages.items(), key=lambda item: -sum(item[1]))
    return [(package, licence, len(sizes), sum(sizes) // 1000) for (package, licence), sizes in biggest_first]


def write_card(
    target: Any,
    draft: Any,
    figures: dict[str, Any],
    training: str,
    corpus_tokens: int,
    sources: list[Source],
    held_out: list[Source],
    prompts: list[str],
    prefix: int,
    written: int,
) -> str:
    characters = sum(len(s.text) for s in sources)
    return CARD.format(
        models=table(model_rows(target, draft)),
        context=f"{target.config.max_position_embeddings:,}",
        vocabulary=f"{target.config.vocab_size:,}",
        training=training,
        prompts=len(prompts),
        prefix=prefix,
        written=written,
        figures=figure_rows(figures),
        summary=f"{len(sources):,} Python files, {characters / 1e6:.1f} MB, {corpus_tokens:,} tokens.",
        sources=table(source_rows(sources)),
        held_out=table([(name, s.name, s.licence) for name, s in zip(prompts, held_out, strict=True)]),
    )
