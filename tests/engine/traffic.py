"""Requests put through an engine in this process, and what its pool holds meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from vllm import LLM, SamplingParams
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import Request

from tests.engine.conftest import block_pool, kv_cache_manager
from tests.engine.oracle_model import oracle_logprobs
from vllm_lminf.middle import Middle
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin.archive import ArchiveManager
from vllm_lminf.plugin.kv_cache import LambdaSpec

# As in test_exactness: two float32 computations that differ in the order of their sums.
TOLERANCE = 3e-5


@dataclass(frozen=True)
class Answer:
    """What an engine said to one request; equal only where every bit is.

    Attributes:
        prompt: its tokens.
        tokens: the generated ones.
        logprobs: for each of them, the log-probabilities of the likeliest tokens and its own.
        num_cached: tokens of the prompt that came from the prefix cache.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[dict[int, float]]
    num_cached: int

    @property
    def generated(self) -> tuple[list[int], list[dict[int, float]]]:
        """What has to be the same wherever the prompt's keys came from."""
        return self.tokens, self.logprobs


def submit(llm: LLM, name: str, prompt: list[int], max_tokens: int, priority: int = 0) -> None:
    """Adds a request; greedy, to exactly max_tokens tokens."""
    sampling = SamplingParams(
        temperature=0, max_tokens=max_tokens, logprobs=5, detokenize=False, ignore_eos=True
    )
    llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, sampling, priority=priority)


def step(llm: LLM) -> dict[str, Answer]:
    """One step of the engine; the answers that are complete."""
    answers = {}
    for output in llm.llm_engine.step():
        if output.finished:
            completion = output.outputs[0]
            logprobs = [{t: e.logprob for t, e in at.items()} for at in completion.logprobs]
            answers[output.request_id] = Answer(
                output.prompt_token_ids,
                list(completion.token_ids),
                logprobs,
                output.num_cached_tokens,
            )
    return answers


def finish(llm: LLM, max_steps: int = 100_000) -> dict[str, Answer]:
    """Steps until every request is answered, and then finds the pool whole."""
    answers: dict[str, Answer] = {}
    for _ in range(max_steps):
        if not llm.llm_engine.has_unfinished_requests():
            assert_pool_is_whole(llm)
            return answers
        answers |= step(llm)
    raise AssertionError(f"{max_steps} steps, and {scheduler(llm).get_request_counts()} are left")


def ask(llm: LLM, prompts: list[list[int]], max_tokens: int) -> list[Answer]:
    """The answers to prompts that arrive together."""
    for number, prompt in enumerate(prompts):
        submit(llm, str(number), prompt, max_tokens)
    answers = finish(llm)
    return [answers[str(number)] for number in range(len(prompts))]


def alone(llm: LLM, prompts: list[list[int]], max_tokens: int) -> list[Answer]:
    """The answer to each prompt when nothing else runs and nothing is cached."""
    answers = []
    for prompt in prompts:
        assert llm.reset_prefix_cache()
        answers += ask(llm, [prompt], max_tokens)
    return answers


def assert_equal_to_oracle(
    model: Path, answers: list[Answer], pattern: LambdaPattern, middle: Middle | None = None
) -> None:
    """Every generated token is the likeliest, and the oracle finds it just as likely."""
    for answer in answers:
        tokens, length = answer.prompt + answer.tokens, len(answer.prompt)
        expected = oracle_logprobs(model, tokens, pattern, torch.float32, middle, length)
        expected = expected[-len(answer.tokens) :]
        chosen = zip(answer.tokens, answer.logprobs, strict=True)
        got = torch.tensor([at[token] for token, at in chosen], dtype=torch.float64)
        assert got.tolist() == [max(at.values()) for at in answer.logprobs]
        torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


def scheduler(llm: LLM) -> Scheduler:
    real: Scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    return real


def block_manager(llm: LLM) -> SingleTypeKVCacheManager:
    """The manager of the one group of layers; their archive, if they have one, is left out."""
    managers = kv_cache_manager(llm).coordinator.single_type_managers
    (manager,) = [each for each in managers if not isinstance(each, ArchiveManager)]
    return manager


def lambda_pattern(llm: LLM) -> LambdaPattern:
    spec = block_manager(llm).kv_cache_spec
    assert isinstance(spec, LambdaSpec)
    return spec.pattern


def assert_pool_is_whole(llm: LLM) -> None:
    """Nobody holds a block, every block is free exactly once, and no request is remembered."""
    for manager in kv_cache_manager(llm).coordinator.single_type_managers:
        pool = manager.block_pool
        free = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
        assert sorted(free) == list(range(1, pool.num_gpu_blocks))
        assert pool.get_num_free_blocks() == len(free)
        assert not any(block.ref_cnt for block in pool.blocks if not block.is_null)
        assert not manager.req_to_blocks
        assert not manager.num_cached_block
    assert not scheduler(llm).requests


def num_held(llm: LLM) -> dict[str, int]:
    """How many blocks each request holds, by its name, to which the engine has added something."""
    return {
        name.rpartition("-")[0]: sum(not block.is_null for block in blocks)
        for name, blocks in block_manager(llm).req_to_blocks.items()
    }


@contextmanager
def chunks_of(llm: LLM, size: int) -> Iterator[None]:
    """No step takes more than so many tokens, as with that max_num_batched_tokens."""
    real = scheduler(llm)
    before = real.max_num_scheduled_tokens
    real.max_num_scheduled_tokens = size
    yield
    real.max_num_scheduled_tokens = before


class CacheView:
    """What the prefix cache holds for one sequence of tokens, and how far it can stand in."""

    def __init__(self, llm: LLM, tokens: list[int]) -> None:
        self._pool = block_pool(llm)
        self._pattern = lambda_pattern(llm)
        self._block_size = block_manager(llm).block_size
        self._tokens = tokens
        request = Request(
            request_id="view",
            prompt_token_ids=tokens,
            sampling_params=SamplingParams(),
            pooling_params=None,
            block_hasher=llm.llm_engine.engine_core.engine_core.request_block_hasher,
        )
        self._hashes = request.block_hashes

    def block(self, entry: int) -> KVCacheBlock | None:
        """The cached block that stands for a block of the sequence."""
        found = self._pool.get_cached_block(self._hashes[entry], [0])
        return found[0] if found else None

    def needed(self, length: int) -> list[int]:
        """The blocks with a token before ``length`` that the query at ``length`` sees; no later
        query sees another of them."""
        return [b for b in range(length // self._block_size) if self._is_seen(length, b)]

    def _is_seen(self, length: int, block: int) -> bool:
        """Global tokens are the first of a block, and a window's the last, or all of it."""
        first, last = block * self._block_size, (block + 1) * self._block_size - 1
        return self._pattern.visible(length, first) or self._pattern.visible(length, last)

    def longest_hit(self) -> int:
        """By trying every length, one token being left to compute."""
        for num_blocks in range((len(self._tokens) - 1) // self._block_size, 0, -1):
            length = num_blocks * self._block_size
            latest_first = range(num_blocks - 1, -1, -1)
            if all(self.block(b) for b in latest_first if self._is_seen(length, b)):
                return length
        return 0

    def evict(self, entry: int) -> None:
        """Makes a free block the pool's next, and has the pool hand it out and take it back."""
        block = self.block(entry)
        assert block is not None
        self._pool.free_block_queue.remove(block)
        self._pool.free_block_queue.prepend_n([block])
        taken = self._pool.get_new_blocks(1)
        assert taken == [block]
        self._pool.free_blocks(taken)
        assert self.block(entry) is None

    def num_cached(self) -> int:
        """How many full blocks of the sequence the cache holds."""
        return sum(self.block(entry) is not None for entry in range(len(self._hashes)))


def tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 512, (count,), generator=generator).tolist()
