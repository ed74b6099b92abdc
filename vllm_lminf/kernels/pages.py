"""Reading positions out of the blocks that a request has them in."""

import torch

from vllm_lminf.pattern import cdiv


def gather(blocks: torch.Tensor, block_row: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """What blocks hold of the positions [start, end): [num_kv_heads, end - start, head_size].

    Only the slots of these positions are part of the result; the rest of their blocks is dropped.

    Args:
        blocks: [num_blocks, num_kv_heads, block_size, head_size].
        block_row: a request's row of the block table.
        start, end: the positions.
    """
    block_size = blocks.shape[2]
    first_block = start // block_size
    skip = first_block * block_size
    found = block_row[first_block : cdiv(end, block_size)].long()
    return blocks.transpose(0, 1)[:, found].flatten(1, 2)[:, start - skip : end - skip]


def take(blocks: torch.Tensor, block_row: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The same of positions that stand apart: [num_kv_heads, num_positions, head_size].

    Args:
        blocks, block_row: as in `gather`.
        positions: int64 [num_positions].
    """
    block_size = blocks.shape[2]
    found = block_row[positions // block_size].long()
    return blocks[found, :, positions % block_size].transpose(0, 1)
