"""Drafts come and go while a long text is being written. The text does not change, its speed does.

    python examples/scale_drafts.py [TARGET DRAFT]

TARGET and DRAFT are folders or hub ids of two models with one vocabulary; without them it takes the bundled pair.
"""

import sys
import threading

from ssd_ray import LLM, SamplingParams

PROMPT = "def main():\n"
PARAMS = SamplingParams(temperature=0.7, seed=3, max_tokens=2000, ignore_eos=True)


def scale(llm: LLM, finished: threading.Event) -> None:
    """1 -> 3 -> 0 -> 1 drafts."""
    for count in (3, 0, 1):
        llm.scale_drafts(count)
        print(f"[{count} drafts: {llm.stats().drafts}]", file=sys.stderr)
    finished.set()


def main() -> None:
    with LLM(*sys.argv[1:3], num_drafts=1) as llm:
        scaled = threading.Event()
        scaling = threading.Thread(target=scale, args=(llm, scaled))
        scaling.start()
        texts = []
        while not scaled.is_set() or len(texts) < 2:  # as many texts as it takes
            texts.append("".join(llm.stream(PROMPT, PARAMS)))
        scaling.join()
        stats = llm.stats()
    if len(set(texts)) > 1:
        sys.exit("the texts differ")
    print(f"{len(texts)} texts of {len(texts[0])} characters, all the same; misses by cause: {stats.misses}")


if __name__ == "__main__":
    main()
