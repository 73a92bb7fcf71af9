"""A client of `ssd-ray serve`, with OpenAI's own package: a completion, and a chat as it comes.

ssd-ray serve --port 8000 &
python examples/serve_client.py [http://127.0.0.1:8000]
"""

import sys

from openai import OpenAI


def main() -> None:
    address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    with OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        (model,) = client.models.list()

        completion = client.completions.create(
            model=model.id, prompt="def add(a, b):", max_tokens=48, temperature=0.7, seed=1
        )
        print(f"def add(a, b):{completion.choices[0].text}")
        print(f"--- {completion.choices[0].finish_reason} after {completion.usage.completion_tokens} tokens")

        question = [{"role": "user", "content": "Write a function that adds two numbers."}]
        for chunk in client.chat.completions.create(model=model.id, messages=question, max_tokens=48, stream=True):
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
