"""Poison: a block that nobody holds is full of NaN; nothing reads or writes it unnoticed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar
from unittest import mock

import torch
from vllm import LLM
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from tests.engine.conftest import archive_manager, block_pool
from vllm_lminf.plugin.archive_backend import Archive

Result = TypeVar("Result")

_BYTE = 0xFF  # What it fills is NaN, read as any floating-point number.


def _poison_of(cache: torch.Tensor) -> float:
    return torch.nan if cache.is_floating_point() else _BYTE


@dataclass
class Poison:
    """The pool and the cache tensors of an engine in this process.

    A free block that the prefix cache can still serve has its contents set aside; they come back
    when a request takes the block over, and not before.

    Attributes:
        num_filled: how often a block was filled because its last holder let go of it.
        num_restored: how often a prefix-cache hit took a free block over.
    """

    pool: BlockPool
    caches: list[torch.Tensor]
    num_filled: int = 0
    num_restored: int = 0
    _aside: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def fill(self, block: KVCacheBlock) -> None:
        """A block has no holder any more."""
        self._aside.pop(block.block_id, None)
        if block.block_hash is not None:
            self._aside[block.block_id] = [c[block.block_id].clone() for c in self.caches]
        for cache in self.caches:
            cache[block.block_id].fill_(_poison_of(cache))

    def restore(self, block: KVCacheBlock) -> None:
        """The prefix cache hands a free block out."""
        self.check(block)
        for cache, contents in zip(self.caches, self._aside.pop(block.block_id), strict=True):
            cache[block.block_id].copy_(contents)

    def check(self, block: KVCacheBlock) -> None:
        """Whether a block is as it was filled."""
        for cache in self.caches:
            contents = cache[block.block_id]
            is_poison = contents.isnan() if cache.is_floating_point() else contents == _BYTE
            assert is_poison.all(), f"block {block.block_id} was written while nobody held it"

    def fill_all(self) -> None:
        """The null block, which stands for blocks that were freed, and every free one."""
        for block in self._without_holder():
            self.fill(block)

    def undo(self) -> None:
        """Gives the prefix cache its contents back, once everything is found as it was filled."""
        for block in self._without_holder():
            self.check(block)
            if block.block_id in self._aside:
                self.restore(block)

    def _without_holder(self) -> list[KVCacheBlock]:
        return [block for block in self.pool.blocks if block.is_null or block.ref_cnt == 0]


@contextmanager
def poisoned(llm: LLM) -> Iterator[Poison]:
    """While it lasts, every block is full of NaN from the moment it is freed until it is reused;
    pages of archives as well, whose poison counts by itself."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    layers = runner.compilation_config.static_forward_context.values()
    pages = [layer.pages for layer in layers if isinstance(layer, Archive)]
    with ExitStack() as archives:
        if pages:
            archives.enter_context(_poisoned(archive_manager(llm).block_pool, pages))
        with _poisoned(block_pool(llm), list(runner.kv_caches)) as poison:
            yield poison


@contextmanager
def _poisoned(pool: BlockPool, caches: list[torch.Tensor]) -> Iterator[Poison]:
    poison = Poison(pool, caches)
    assert all(cache.shape[0] == pool.num_gpu_blocks for cache in poison.caches)
    real_free, real_touch, real_get = pool.free_blocks, pool.touch, pool.get_new_blocks

    def free_blocks(ordered_blocks: Iterable[KVCacheBlock]) -> None:
        blocks = list(ordered_blocks)
        real_free(blocks)
        for block in blocks:
            if block.ref_cnt == 0 and not block.is_null:
                poison.fill(block)
                poison.num_filled += 1

    def touch(blocks: Sequence[KVCacheBlock]) -> None:
        for block in blocks:
            if block.ref_cnt == 0 and not block.is_null:
                poison.restore(block)
                poison.num_restored += 1
        real_touch(blocks)

    def get_new_blocks(num_blocks: int) -> list[KVCacheBlock]:
        blocks = real_get(num_blocks)
        for block in blocks:
            poison.check(block)
        return blocks

    poison.fill_all()
    with mock.patch.multiple(
        pool, free_blocks=free_blocks, touch=touch, get_new_blocks=get_new_blocks
    ):
        yield poison
    poison.undo()


def assert_poison_changes_no_bit(llm: LLM, scenario: Callable[[], Result]) -> Result:
    """Runs a scenario twice from an empty prefix cache, the second time under poison.

    Returns:
        What the scenario returned, both times.
    """
    assert llm.reset_prefix_cache()
    clean = scenario()
    assert llm.reset_prefix_cache()
    with poisoned(llm) as poison:
        assert scenario() == clean
    assert poison.num_filled > 0
    return clean
