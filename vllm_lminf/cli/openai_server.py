"""An OpenAI-compatible server, as far as evaluations ask it."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from typing import Any


class Server:
    """An OpenAI-compatible server.

    Args:
        url: up to and with ``/v1``.
        model: the server's name for the model; None for the only one that it serves.

    Raises:
        RuntimeError: it doesn't answer, or serves several models.
    """

    def __init__(self, url: str, model: str | None) -> None:
        self._url = url
        self._model = model or self._only_model()

    def complete(self, prompt: list[int], max_tokens: int) -> str:
        """Return what the server generates greedily after these tokens."""
        answer = self._call(
            "/completions",
            {
                "model": self._model,
                "prompt": prompt,
                "max_tokens": max_tokens,
                "temperature": 0,
            },
        )
        text: str = answer["choices"][0]["text"]
        return text

    def logprobs(self, prompt: list[int]) -> list[float]:
        """Return the log-probability, in nats, of each of these tokens but the first."""
        answer = self._call(
            "/completions",
            {
                "model": self._model,
                "prompt": prompt,
                "max_tokens": 1,
                "temperature": 0,
                "echo": True,
                "logprobs": 1,
            },
        )
        found: list[float] = answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(prompt)]
        if len(found) != len(prompt) - 1:
            raise RuntimeError(
                f"{self._url} gives {len(found)} log-probabilities for {len(prompt)} tokens"
            )
        return found

    def _only_model(self) -> str:
        names: list[str] = [model["id"] for model in self._call("/models")["data"]]
        if len(names) != 1:
            raise RuntimeError(
                f"{self._url} serves {', '.join(names) or 'no model'}: name one with --served-model"
            )
        return names[0]

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, headers)
        try:
            with urllib.request.urlopen(request) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:500]
            raise RuntimeError(f"{self._url}{path} answers {error.code}: {said}") from error
        except urllib.error.URLError as error:
            raise RuntimeError(
                f"{self._url}{path} doesn't answer ({error.reason}): is --url right, and the "
                "server up?"
            ) from error
