"""A client that opens two long streams, says so, and reads on until somebody kills it.

python doomed_client.py BASE_URL MODEL
"""

import sys

import openai


def main(base_url: str, model: str) -> None:
    client = openai.OpenAI(base_url=base_url, api_key="unused", timeout=600, max_retries=0)
    streams = [
        client.completions.create(
            model=model,
            prompt=[token] * 1500,
            max_tokens=18_000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for token in (1, 2)
    ]
    next(streams[0])
    print("streaming", flush=True)
    for stream in streams:
        for _ in stream:
            pass


if __name__ == "__main__":
    main(*sys.argv[1:])
