"""A driver for the lifecycle tests: starts an engine for each line of standard input, and ends it as the line says.

``close`` leaves the engine in order, ``error`` by an exception, ``wait`` goes on until it is interrupted or killed.
After "running" on standard output the engine decodes; after "closed" it is said to be gone.
"""

from __future__ import annotations

import sys

from ssd_ray import LLM, SamplingParams


def decode_until(ending: str, models: list[str]) -> None:
    params = SamplingParams(max_tokens=400, ignore_eos=True)
    with LLM(*models) as llm:
        next(llm.stream("x", params))
        print("running", flush=True)
        sys.stdin.readline()  # the test looks around
        if ending == "error":
            raise RuntimeError("in the middle")
        while ending == "wait":
            llm.generate("x", params)


def main() -> None:
    print("imported", flush=True)
    while ending := sys.stdin.readline().strip():
        try:
            decode_until(ending, sys.argv[1:3])
        except (RuntimeError, KeyboardInterrupt) as error:
            print(type(error).__name__, flush=True)
        print("closed", flush=True)


if __name__ == "__main__":
    main()
