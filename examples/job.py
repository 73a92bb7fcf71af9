"""A batch of prompts as a Ray job: reads prompts, writes results.

    python examples/job.py [--prompts FILE] [--output FILE] [--target DIR --draft DIR]
    RAY_AUTH_MODE=token ray job submit --working-dir . -- python examples/job.py

Inside a job the engine's actors run on the job's cluster. Without a cluster this starts a Ray of its own. Leave
RAY_AUTH_MODE out if the cluster was started without a token; `ray start` says so.
"""

import argparse
import json
from pathlib import Path

from ssd_ray import LLM, SamplingParams

DEFAULT_PROMPTS = ["def quicksort(items):\n", "class Node:\n", "import json\n\ndef load(path):\n"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, help="a text file, one prompt a line")
    parser.add_argument(
        "--output", type=Path, default=Path("results.jsonl"), help="where results go, one JSON line each"
    )
    parser.add_argument("--target", help="folder or hub id of the target; the bundled one if left out")
    parser.add_argument("--draft", help="folder or hub id of the draft; the bundled one if left out")
    parser.add_argument("--num-drafts", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    prompts = args.prompts.read_text().splitlines() if args.prompts else DEFAULT_PROMPTS
    params = SamplingParams(temperature=0.0, max_tokens=64)
    with LLM(args.target, args.draft, num_drafts=args.num_drafts) as llm, args.output.open("w") as results:
        for output in llm.outputs(prompts, params):
            result = {"prompt": output.prompt, "text": output.text, "finish_reason": output.finish_reason}
            results.write(json.dumps(result) + "\n")
    print(f"{len(prompts)} results in {args.output}; hit rate {output.stats.hit_rate:.0%} in the last one")


if __name__ == "__main__":
    main()
