"""What every kernel is: a class made from a layer's configuration, which writes the layer's cache
and attends.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Self

import torch

from vllm_lminf.kernels.archive import ArchiveFormat, RecallBatch
from vllm_lminf.middle import Middle
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.rope import RotationTables


@dataclass
class ScoreRules:
    """How a scaled product of query and key becomes a score.

    Attributes:
        scale: factor on every product.
        softcap: a score ``s`` becomes ``softcap * tanh(s / softcap)``; None leaves it.
        alibi_slopes: float32 [num_heads]; a pair at distance ``d`` loses ``slope * d``, with ``d``
            no more than the distance limit. None for no such bias.
        sinks: [num_heads]: the score of one more key, whose value is zero. None for no such key.
    """

    scale: float
    softcap: float | None = None
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None


@dataclass(frozen=True)
class Heads:
    """The heads of a layer.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key heads; divides num_heads.
        head_size: dimensions of a head.
        dtype: of queries and outputs.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Rotation:
    """The model's RoPE, as a kernel turns with it: by whole positions, without its magnitude.

    Attributes:
        tables: exact angles of any position.
        is_neox_style: how pairs are laid out, see `vllm_lminf.rope.RotarySpec`.
    """

    tables: RotationTables
    is_neox_style: bool


@dataclass(frozen=True)
class PagedCache:
    """The keys and values of a layer, in blocks.

    Attributes:
        key: rotated; [num_blocks, num_kv_heads, block_size, head_size]; strides are free but for
            the last, which is 1. Of the queries' dtype, or float8_e4m3fn or float8_e5m2.
        value: the same.
        key_scale: what a stored key is multiplied with; float32 of one element on the cache's
            device. None for 1.
        value_scale: the same for values.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        kv_cache: torch.Tensor,
        dtype: torch.dtype,
        key_scale: torch.Tensor | None = None,
        value_scale: torch.Tensor | None = None,
    ) -> Self:
        """Views of a cache in which each head of a block stores all its keys, then all its values.

        Args:
            kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], contiguous in its last
                three dimensions; 8-bit numbers may be typed as bytes.
            dtype: of what is stored.
            key_scale, value_scale: kept for 8-bit numbers; wider ones are stored as they are.
        """
        num_blocks, num_kv_heads, block_size, double = kv_cache.shape
        halves = kv_cache.view(dtype).view(num_blocks, num_kv_heads, 2, block_size, double // 2)
        key, value = halves[:, :, 0], halves[:, :, 1]
        return cls(key, value) if dtype.itemsize > 1 else cls(key, value, key_scale, value_scale)


@dataclass(frozen=True)
class DeviceBatch:
    """A batch whose description lies on the device, so that nothing waits for it.

    Requests may be padding: without query rows, and of any seq_len.

    Attributes:
        query_start_loc: int32 [num_requests + 1]: request r owns the query rows from
            ``query_start_loc[r]`` to ``query_start_loc[r + 1]``, its latest tokens.
        seq_lens: int32 [num_requests]: tokens in the cache, these queries' own included.
        block_table: int32 [num_requests, max_blocks]. Entries of blocks that were freed are never
            followed.
        max_query_len: no request has more query rows; known on the host.
        query_start_loc_cpu, seq_lens_cpu: the same on the host, where they are there anyway; a
            kernel that needs them waits for the device without.
        shared: what a kernel works out of this batch for all layers. A batch is one step's, or one
            captured graph's: never changed and used again.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    max_query_len: int
    query_start_loc_cpu: torch.Tensor | None = None
    seq_lens_cpu: torch.Tensor | None = None
    shared: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class FlashAttentionProvider:
    """Where FlashAttention comes from: its package is chosen by whoever makes a layer.

    Attributes:
        unavailable_reasons: why there is none here; empty where there is.
        function: the function for heads of so many dimensions: vLLM's ``flash_attn_varlen_func``,
            with its ``fa_version`` already given.
    """

    unavailable_reasons: Callable[[], list[str]]
    function: Callable[[int], Callable[..., tuple[torch.Tensor, torch.Tensor]]]


@dataclass(frozen=True, eq=False)
class LayerConfig:
    """A layer and where it runs: what a kernel is chosen by, and made from.

    Attributes:
        heads: the layer's.
        pattern: the layer's Λ.
        rules: how products become scores.
        cache_dtype: of stored keys and values.
        block_size: tokens of a block.
        device: of the model. Its type "cuda" stands for AMD's devices too.
        capability: a CUDA device's compute capability; None elsewhere, AMD included.
        rotation: the model's RoPE; None where nothing is rotated.
        decode_len: queries of a request that decodes, its drafts included.
        middle: what its queries recall; None where the layer has no archive.
        index_bits: of an element of the archive's index.
        flash_attention: for the kernels that call it.
        shared: what an engine's layers keep in common, as a workspace. They run one after the
            other, on one stream.
    """

    heads: Heads
    pattern: LambdaPattern
    rules: ScoreRules
    cache_dtype: torch.dtype
    block_size: int
    device: torch.device
    capability: tuple[int, int] | None = None
    rotation: Rotation | None = None
    decode_len: int = 1
    middle: Middle | None = None
    index_bits: int = 8
    flash_attention: FlashAttentionProvider | None = None
    shared: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @property
    def far_rotation(self) -> Rotation | None:
        """What far pairs are turned by. Without global tokens nothing is ever beyond the limit."""
        return self.rotation if self.pattern.n_global > 0 else None

    @property
    def archive_format(self) -> ArchiveFormat:
        """Of the layer's archive."""
        heads = self.heads
        return ArchiveFormat(
            heads.num_kv_heads, heads.head_size, self.block_size, self.cache_dtype, self.index_bits
        )

    @property
    def signature(self) -> Hashable:
        """Equal for layers that kernels are compiled for alike."""
        rules = self.rules
        # An archive's keys are turned back wherever the model has RoPE.
        rotation = self.far_rotation if self.middle is None else self.rotation
        return (
            self.heads,
            self.pattern,
            self.cache_dtype,
            self.block_size,
            self.device,
            None if rotation is None else (rotation.tables.tables.shape[1], rotation.is_neox_style),
            rules.softcap,
            rules.alibi_slopes is None,
            None if rules.sinks is None else rules.sinks.dtype,
            self.middle,
            self.index_bits,
        )


class Captures(Enum):
    """Which steps may be captured in a CUDA graph: those in which nothing waits for the device, and
    what is launched depends on shapes alone."""

    NEVER = "never"
    DECODE = "steps in which every request decodes"
    ALWAYS = "always"


class Kernel(ABC):
    """Λ-attention of one layer. It writes the cache that it attends to, since each kernel has an
    order of its own in which a block stores its keys and values.

    Attributes:
        captures: see `Captures`.
        block_multiple: block sizes are multiples of this.
        preferred_block_size: best where nobody names one; None to leave it to the engine.
        recalls: whether it takes layers with a middle: `write_archive` and `attend_and_recall`.
        variant: in which of several ways it computes on this machine; empty where it has one.
    """

    captures: ClassVar[Captures] = Captures.NEVER
    block_multiple: ClassVar[int] = 16
    preferred_block_size: ClassVar[int | None] = None
    recalls: ClassVar[bool] = False
    variant: str = ""

    @classmethod
    @abstractmethod
    def unsupported_reasons(cls, layer: LayerConfig) -> list[str]:
        """Why this kernel doesn't take a layer; empty where it does. Loads nothing."""

    @classmethod
    def unavailable_reasons(cls, layer: LayerConfig) -> list[str]:
        """Why what this kernel needs for a layer can't be had in this process; empty where it can.
        Compiles and loads it."""
        return []

    @classmethod  # noqa: B027
    def start_loading(cls, layer: LayerConfig) -> None:
        """Starts in the background what takes long of `unavailable_reasons`, if anything does."""

    @abstractmethod
    def __init__(self, layer: LayerConfig) -> None:
        """For a layer that neither of the above has a reason against."""

    @property
    def search_counts(self) -> torch.Tensor | None:
        """Of a kernel whose searches of the middle may have to go over a part of it again: int64
        [2], where the kernel runs: searches, one for each head of a query that looks, and those
        among them that did. Layers of an engine may share them."""
        return None

    def temporary_bytes(self, num_tokens: int, max_requests: int) -> int:
        """What a step of so many tokens and requests allocates for a while besides its result."""
        return 0

    @abstractmethod
    def write_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: PagedCache,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Stores keys and values in their slots.

        Args:
            key: rotated; shape [>= num_tokens, num_kv_heads, head_size]; rows past num_tokens are
                padding.
            value: same shape.
            cache: written in place, divided by its scales where it has some.
            slot_mapping: int64 [num_tokens]: ``block * block_size + offset`` of every token, or a
                negative number for a token that has no slot.
        """

    @abstractmethod
    def attend(
        self, query: torch.Tensor, cache: PagedCache, batch: DeviceBatch, output: torch.Tensor
    ) -> None:
        """Attention of a batch of requests, prefill and decode mixed freely.

        Args:
            query: rotated by its true position; shape [num_tokens, num_heads, head_size]; rows
                past the last request's are padding.
            cache: the keys and values, those of this step included.
            batch: the batch.
            output: written in place; of query's shape.
        """

    def write_archive(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        archive: torch.Tensor,
        batch: DeviceBatch,
        recall: RecallBatch,
    ) -> None:
        """Keeps a step's keys and values in the archive, and indexes the pages that they fill. Only
        of a layer with a middle.

        Args:
            key, value: as in `write_cache`.
            archive: uint8 [num_pages, page_bytes], see `ArchiveFormat`; written in place.
            batch: the step's, whose rows these keys are.
            recall: where they go.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no archive")

    def attend_and_recall(
        self,
        query: torch.Tensor,
        cache: PagedCache,
        batch: DeviceBatch,
        archive: torch.Tensor,
        recall: RecallBatch,
        output: torch.Tensor,
    ) -> None:
        """As `attend`, in a layer with a middle: queries from `RecallBatch.first_rows` on also
        attend to the best units of what the Λ hides, in the one softmax. What is computed is
        `vllm_lminf.kernels.oracle.lambda_attention` with ``middle``; no result depends on what else
        is in the batch, or on how a prompt is cut into steps.

        Args:
            query, cache, batch, output: as in `attend`.
            archive, recall: what `write_archive` was given in this step.
        """
        raise NotImplementedError(f"{type(self).__name__} recalls nothing")

    def warm_up(  # noqa: B027
        self, cache: PagedCache, max_requests: int, max_query_len: int
    ) -> None:
        """Compiles and loads whatever the two above can launch; by default there is nothing. Reads
        and writes no slot that belongs to a request.

        Args:
            cache: the layer's: its memory order and dtype are what kernels are compiled for.
            max_requests: no batch has more requests, padding included.
            max_query_len: no request has more queries.
        """
