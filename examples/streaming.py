"""A text as it comes, piece by piece, and a look at its figures when it has ended.

    python examples/streaming.py [TARGET DRAFT]

TARGET and DRAFT are folders or hub ids of two models with one vocabulary; without them it takes the bundled pair.
"""

import sys

from ssd_ray import LLM, SamplingParams

PROMPT = "class Stack:\n"


def main() -> None:
    with LLM(*sys.argv[1:3]) as llm:
        stream = llm.stream(PROMPT, SamplingParams(max_tokens=96, seed=1))
        print(PROMPT, end="")
        for piece in stream:  # leaving this loop early, and stream.close(), cancel the request
            print(piece, end="", flush=True)
        output = stream.wait()
    print(f"\n--- {output.finish_reason}, {output.stats.tokens_per_round:.2f} tokens per round")


if __name__ == "__main__":
    main()
