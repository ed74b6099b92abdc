"""Λ-attention by FlashAttention: its windowed kernel, merged with the global keys by a small one.

Made for prefill on devices where FlashAttention knows their hardware best, from compute capability
9.0 on. The function that attends is the caller's: vLLM ships one.

What a chunk costs, for ``h`` query heads and ``k`` key heads of ``d`` dimensions in 16 bits, ``w``
keys in the window, ``q`` queries of a request:

- FlashAttention computes ``4 * h * d`` flops for every visible pair, ``w`` of them for a query
  behind the window's length; 67 Mflop a token for w = 4096, h = 32, d = 128. On an H100's 989
  Tflop/s that is 68 ns a token and layer; 0.65 to 0.75 of that speed is what FlashAttention 3 is
  known for.
- It moves ``4 * h * d`` bytes of queries and outputs a token, 16 KiB, and reads ``(w + q) * 4 * k *
  d`` bytes of keys and values from memory once, 6 KiB a token of a chunk of 8192 for k = 8: 7 ns a
  token at 3.35 TB/s. It is bound by its products.
- The merge reads queries, outputs and log-sum-exps and writes outputs, ``6 * h * d`` bytes a token,
  24 KiB: 7 ns a token, a tenth of the products' time. It computes ``4 * h * d * n_global`` flops a
  token, 0.2 ns for 10 keys. Rows that see no global key behind their window, the first ``w`` of a
  sequence, aren't touched. The sinks come in the same pass.
- The part of the block table that windows lie in is gathered once a step, for all layers.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_lminf.kernels.base import Captures, DeviceBatch, LayerConfig, PagedCache
from vllm_lminf.kernels.triton.layer import TritonCacheKernel, TritonKernel
from vllm_lminf.pattern import cdiv

_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class WindowTable:
    """Where the keys are that some window of a batch sees, and no others.

    A kernel that loads whole tiles follows entries of the block table on both sides of what its
    rows see. Entries of blocks that were freed name blocks that others have written since, whose
    NaN would come through a weight of zero. There are none of them here: a request's keys begin
    with the block in which its first window does. Where they begin makes no difference to
    distances within a window. It also makes the cost independent of a sequence's length.

    Attributes:
        block_table: int32 [num_requests, columns].
        seq_lens: int32 [num_requests]: keys from the first of these blocks on.
        longest: no request has more.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    longest: int

    @classmethod
    def of(cls, batch: DeviceBatch, n_local: int, block_size: int) -> "WindowTable":
        """Cuts a batch's block table down; made once a step for layers that are alike."""
        name = ("window table", n_local, block_size)
        if name not in batch.shared:
            batch.shared[name] = cls._make(batch, n_local, block_size)
        table: WindowTable = batch.shared[name]
        return table

    @classmethod
    def _make(cls, batch: DeviceBatch, n_local: int, block_size: int) -> "WindowTable":
        width = batch.block_table.shape[1]
        columns = min(width, cdiv(n_local - 1 + batch.max_query_len, block_size) + 1)
        position = batch.seq_lens - batch.query_start_loc.diff()
        first = (position - n_local + 1).clamp(min=0) // block_size
        # A request of padding may be of any length.
        column = first[:, None] + torch.arange(columns, device=first.device)
        table = batch.block_table.gather(1, column.clamp(max=width - 1))
        return cls(table, batch.seq_lens - first * block_size, columns * block_size)


class FlashKernel(TritonCacheKernel):
    """See the module. That launches of FlashAttention may be captured was never tried.

    Raises:
        ValueError: a rule isn't served, or no FlashAttention was handed in.
    """

    captures: ClassVar[Captures] = Captures.NEVER

    @classmethod
    def unsupported_reasons(cls, layer: LayerConfig) -> list[str]:
        heads, capability, block_size = layer.heads, layer.capability, layer.block_size
        on_nvidia = layer.device.type == "cuda" and capability is not None
        table = (
            (
                not on_nvidia,
                "vLLM's FlashAttention runs on NVIDIA's devices: choose kernel triton",
            ),
            (
                on_nvidia and (capability or ()) < (8, 0),
                "compute capability {}.{}: FlashAttention takes 8.0 and newer".format(
                    *capability or (0, 0)
                ),
            ),
            (
                heads.dtype not in _DTYPES,
                f"{heads.dtype}: FlashAttention takes float16 and bfloat16; choose --dtype "
                "bfloat16, or kernel triton",
            ),
            (
                layer.cache_dtype != heads.dtype,
                f"a cache of {layer.cache_dtype}: FlashAttention would round the queries to it "
                "too; choose --kv-cache-dtype auto, or kernel triton",
            ),
            (
                heads.head_size % 8 != 0 or heads.head_size > 256,
                f"heads of {heads.head_size} dimensions: FlashAttention takes multiples of 8 up to "
                "256; choose kernel triton",
            ),
            (
                block_size % 16 != 0,
                f"blocks of {block_size} tokens: FlashAttention takes multiples of 16; set "
                "--block-size 16",
            ),
            (
                layer.rules.alibi_slopes is not None,
                "ALiBi: FlashAttention 3 and newer have none; choose kernel triton",
            ),
        )
        prefix = [f"the prefix: {reason}" for reason in TritonKernel.unsupported_reasons(layer)]
        return [reason for applies, reason in table if applies] + prefix

    @classmethod
    def unavailable_reasons(cls, layer: LayerConfig) -> list[str]:
        if layer.flash_attention is None:
            return ["no FlashAttention was handed in"]
        return layer.flash_attention.unavailable_reasons()

    def __init__(self, layer: LayerConfig) -> None:
        if layer.rules.alibi_slopes is not None:
            raise ValueError("FlashAttention 3 and newer serve no ALiBi")
        if layer.flash_attention is None:
            raise ValueError("no FlashAttention was handed in")
        super().__init__(layer)
        self._merging = TritonKernel(layer)
        self._flash_attention = layer.flash_attention.function(layer.heads.head_size)
        self._n_local, self._block_size = layer.pattern.n_local, layer.block_size
        self._scale = float(layer.rules.scale)
        self._window = [layer.pattern.n_local - 1, 0]
        self._softcap = layer.rules.softcap or 0.0

    def temporary_bytes(self, num_tokens: int, max_requests: int) -> int:
        """Log-sum-exps, and the cut-down block table with its indices of 64 bits. FlashAttention's
        own workspace, some bytes a tile, is left out."""
        columns = cdiv(self._n_local - 1 + num_tokens, self._block_size) + 1
        requests = min(max_requests, num_tokens)
        return 4 * num_tokens * self._heads.num_heads + 20 * requests * columns

    def attend(
        self, query: torch.Tensor, cache: PagedCache, batch: DeviceBatch, output: torch.Tensor
    ) -> None:
        if query.shape[0] == 0 or batch.seq_lens.shape[0] == 0:
            return
        window = WindowTable.of(batch, self._n_local, cache.key.shape[2])
        _, lse = self._flash_attention(
            query,
            cache.key.transpose(1, 2),
            cache.value.transpose(1, 2),
            max_seqlen_q=batch.max_query_len,
            cu_seqlens_q=batch.query_start_loc,
            max_seqlen_k=window.longest,
            seqused_k=window.seq_lens,
            softmax_scale=self._scale,
            causal=True,
            window_size=self._window,
            softcap=self._softcap,
            block_table=window.block_table,
            return_softmax_lse=True,
            out=output,
        )
        self._merging.merge_global_branch(query, cache, batch, output, lse)

    def warm_up(self, cache: PagedCache, max_requests: int, max_query_len: int) -> None:
        """See `Kernel`. FlashAttention is called for one token of a request in the cache's first
        block, which belongs to nobody: what is read there is used for nothing."""
        super().warm_up(cache, max_requests, max_query_len)
        heads, device = self._heads, cache.key.device
        shape = 2, 1, heads.num_heads, heads.head_size
        query, output = torch.zeros(shape, dtype=heads.dtype, device=device)
        start = torch.arange(2, dtype=torch.int32, device=device)
        for queries in {1, max_query_len}:
            batch = DeviceBatch(start, start[1:], torch.zeros_like(start[:1, None]), queries)
            self.attend(query, cache, batch, output)
        self._merging.warm_up_merge(cache, max_query_len)
