"""Several prompts, each with its own sampling, and the figures of the run.

    python examples/offline.py [TARGET DRAFT]

TARGET and DRAFT are folders or hub ids of two models with one vocabulary; without them it takes the bundled pair.
"""

import sys

from ssd_ray import LLM, SamplingParams

PROMPTS = ["def add(a, b):\n", "import os\n\ndef walk(path):\n"]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=48),  # greedy
    SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=48, stop="\n\n"),  # one seed, one text
]


def main() -> None:
    with LLM(*sys.argv[1:3]) as llm:
        for output in llm.generate(PROMPTS, PARAMS):
            print(f"--- {output.finish_reason} after {len(output.token_ids)} tokens\n{output.prompt}{output.text}")
        stats = llm.stats()
    print(f"--- {stats.tokens_per_round:.2f} tokens per round, hit rate {stats.hit_rate:.0%}, misses {stats.misses}")


if __name__ == "__main__":
    main()
