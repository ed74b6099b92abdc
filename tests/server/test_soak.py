"""500 requests from eight clients at once, with accidents: an answer that arrives is the right one.

Right is what the server answers to the same prompt when it is alone. Equality can be asked because
the model runs in float32, where other requests in the batch move a log-probability by less than a
millionth (a matrix product of another shape adds its terms in another order), while the best token
of these answers leads by hundreds of times that at every step: the test checks both figures.
"""

import contextlib
import queue
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import sub
from pathlib import Path

import openai
import pytest

from tests.server import doomed_client
from tests.server.conftest import BLOCK_SIZE, POOL_BLOCKS, TINY_MAX_LEN, TINY_VOCABULARY, Server

pytestmark = pytest.mark.server

CLIENTS = 8
REQUESTS = 500
POOL_TOKENS = (POOL_BLOCKS - 1) * BLOCK_SIZE  # vLLM keeps one block for itself

LEAST_LEAD = 2e-4
LARGEST_DRIFT = 2e-5

WHOLE, STREAM, HANG_UP_ON_STREAM, HANG_UP_EARLY, ASK_NONSENSE, DIE = range(6)
KILLED = (150, 300)  # the requests whose client dies


@dataclass(frozen=True)
class Question:
    prompt: tuple[int, ...]
    max_tokens: int

    def arguments(self) -> dict[str, object]:
        return {
            "model": "tiny",
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "logprobs": 2,
            "extra_body": {
                "ignore_eos": True,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
            },
        }


@dataclass(frozen=True)
class Answer:
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    least_lead: float
    """Least difference in log-probability, over the tokens, to the next best token."""


def questions(random_: random.Random) -> dict[str, list[Question]]:
    """Prompts by kind. Some share a beginning, some take more than five pools."""

    def question(length: int, beginning: tuple[int, ...] = ()) -> Question:
        rest = random_.choices(range(TINY_VOCABULARY), k=length - len(beginning))
        return Question((*beginning, *rest), random_.randint(1, 24))

    medium = [question(random_.randint(150, 900)) for _ in range(12)]
    return {
        "short": [question(random_.randint(1, 150)) for _ in range(20)],
        "medium": medium,
        "shared": [question(500, other.prompt[:140]) for other in medium[:6]],
        "long": [question(random_.randint(1000, 2000)) for _ in range(6)],
        "five pools": [question(5 * POOL_TOKENS + extra) for extra in (1, 100, 700)],
    }


def join(pieces: Iterable[openai.types.Completion]) -> Answer:
    """The answer from the pieces it came in."""
    choices = [piece.choices[0] for piece in pieces]
    best = [sorted(top.values()) for c in choices for top in c.logprobs.top_logprobs]
    return Answer(
        tuple(token for c in choices for token in c.token_ids),
        tuple(logprob for c in choices for logprob in c.logprobs.token_logprobs),
        min(first - second for second, first in best),
    )


def ask(client: openai.OpenAI, question: Question) -> Answer:
    return join([client.completions.create(**question.arguments())])


def ask_for_stream(client: openai.OpenAI, question: Question) -> Answer:
    return join(client.completions.create(stream=True, **question.arguments()))


def hang_up_on_stream(client: openai.OpenAI, question: Question, num_chunks: int) -> None:
    with client.completions.create(stream=True, **question.arguments()) as stream:
        for _, _ in zip(range(num_chunks), stream, strict=False):
            pass


def hang_up_early(client: openai.OpenAI, question: Question, seconds: float) -> None:
    """Gives up after a moment, whether the answer is there or not."""
    with contextlib.suppress(openai.APITimeoutError):
        client.with_options(timeout=seconds).completions.create(**question.arguments())


def ask_for_nonsense(client: openai.OpenAI, number: int) -> None:
    bad = [
        {"prompt": ""},
        {"max_tokens": -1},
        {"prompt": [TINY_VOCABULARY]},
        {"prompt": [5] * (TINY_MAX_LEN + 1)},
        {"prompt": "a" * 2_000_000},
        {"temperature": "hot"},
    ]
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 4} | bad[number % len(bad)]
    with pytest.raises(openai.BadRequestError):
        client.post("/completions", body=body, cast_to=object)


@dataclass
class Watch:
    """Asks for the server's health all the time, and notes how busy it is."""

    server: Server
    num_checks: int = 0
    most_running: float = 0
    most_waiting: float = 0

    def run(self, stop: threading.Event) -> None:
        while not stop.wait(0.2):
            assert self.server.is_healthy()
            values = self.server.metrics()
            self.num_checks += 1
            self.most_running = max(self.most_running, values["vllm:num_requests_running"])
            self.most_waiting = max(self.most_waiting, values["vllm:num_requests_waiting"])


def kill_a_client(server: Server) -> None:
    """SIGKILL to a process that reads two streams."""
    command = [sys.executable, str(Path(doomed_client.__file__)), server.base_url, "tiny"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "streaming\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


def test_every_answer_is_the_one_given_alone(tiny_server: Server) -> None:
    soak(tiny_server, REQUESTS)


def soak(server: Server, num_requests: int) -> None:
    """So many requests, of which some die."""
    random_ = random.Random(4)
    kinds = questions(random_)
    assert min(len(q.prompt) for q in kinds["five pools"]) > 5 * POOL_TOKENS
    before = server.wait_until_idle()

    alone: dict[Question, Answer] = {}
    client = server.client()
    for question in (question for kind in kinds.values() for question in kind):
        alone[question] = ask(client, question)
        assert len(alone[question].tokens) == question.max_tokens
    assert min(answer.least_lead for answer in alone.values()) > LEAST_LEAD

    work: queue.SimpleQueue[tuple[int, Question]] = queue.SimpleQueue()
    for number in range(num_requests):
        (kind,) = random_.choices(list(kinds), (52, 25, 12, 8, 3))
        (action,) = random_.choices(range(5), (42, 42, 6, 4, 6))
        work.put((DIE if number in KILLED else action, random_.choice(kinds[kind])))

    def be_a_client(seed: int) -> list[float]:
        """Works until nothing is left; returns how far the log-probabilities were off."""
        mine = random.Random(seed)
        client = server.client()
        drifts = []
        while True:
            try:
                action, question = work.get_nowait()
            except queue.Empty:
                return drifts
            if action == HANG_UP_ON_STREAM:
                hang_up_on_stream(client, question, mine.randint(0, 5))
            elif action == HANG_UP_EARLY:
                hang_up_early(client, question, mine.uniform(0.001, 0.3))
            elif action == ASK_NONSENSE:
                ask_for_nonsense(client, mine.randrange(6))
            elif action == DIE:
                kill_a_client(server)
            else:
                answer = (ask_for_stream if action == STREAM else ask)(client, question)
                expected = alone[question]
                assert answer.tokens == expected.tokens
                drifts.append(max(map(abs, map(sub, answer.logprobs, expected.logprobs))))

    stop = threading.Event()
    watch = Watch(server)
    with ThreadPoolExecutor(CLIENTS + 1) as threads:
        watching = threads.submit(watch.run, stop)
        try:
            drifts = [drift for each in threads.map(be_a_client, range(CLIENTS)) for drift in each]
        finally:
            stop.set()
        watching.result()

    after = server.wait_until_idle()
    for name in ("vllm:kv_cache_usage_perc", "vllm:lminf_kv_blocks_pinned"):
        assert after[name] == before[name] == 0
    assert after["vllm:lminf_kv_blocks_freed_total"] > before["vllm:lminf_kv_blocks_freed_total"]
    assert len(drifts) > 0.75 * num_requests
    assert max(drifts) < LARGEST_DRIFT
    assert watch.num_checks > 0
    assert watch.most_running > 1
    assert watch.most_waiting > 0
    assert "Traceback" not in server.log
