"""Which kernel a layer runs: the compiled one where it serves, plain PyTorch elsewhere."""

import torch
from vllm.logger import init_logger

from vllm_lminf.attention.metadata import LambdaMetadata, Rotary
from vllm_lminf.kernels import cpu, paged
from vllm_lminf.kernels.interface import ScoreRules
from vllm_lminf.kernels.native.build import BuildError
from vllm_lminf.pattern import LambdaPattern

logger = init_logger("vllm.lminf")


class LayerKernel:
    """What a layer does with its cache. Writing and attending go by the same kernel, since each
    has an order of its own in which a block stores its keys and values.

    Args:
        compiled: the layer's compiled kernel, or None where it doesn't serve.
        pattern: the layer's Λ.
        rules: how its products become scores.
        rotary: its exact rotation, or None where nothing is rotated.
    """

    def __init__(
        self,
        compiled: cpu.CpuLayer | None,
        pattern: LambdaPattern,
        rules: ScoreRules,
        rotary: Rotary | None,
    ) -> None:
        self._compiled = compiled
        self._pattern = pattern
        self._rules = rules
        # Without global tokens nothing is ever beyond the limit.
        self._rotary = rotary if pattern.n_global > 0 else None

    def name(self, block_size: int, dtype: torch.dtype) -> str:
        """Which kernel runs on such a cache; one of the settings."""
        compiled = self._compiled
        return "cpu" if compiled is not None and compiled.serves(block_size, dtype) else "torch"

    def write_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Stores keys and values in their slots; see `vllm_lminf.kernels.paged.write_cache`."""
        compiled = self._compiled_for(kv_cache)
        write = paged.write_cache if compiled is None else compiled.write_cache
        write(key, value, kv_cache, slot_mapping)

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: LambdaMetadata,
        output: torch.Tensor,
    ) -> None:
        """Attention of a batch; see `vllm_lminf.kernels.paged.lambda_attention`."""
        compiled = self._compiled_for(kv_cache)
        if compiled is not None:
            batch = metadata.cpu_batch(self._rotary, self._pattern)
            compiled.lambda_attention(query, kv_cache, batch, output)
            return
        paged.lambda_attention(
            query,
            kv_cache,
            metadata.block_table,
            metadata.query_start_loc.tolist(),
            metadata.seq_lens.tolist(),
            self._pattern,
            rules=self._rules,
            far=None if self._rotary is None else metadata.far(self._rotary, self._pattern),
            output=output,
        )

    def _compiled_for(self, kv_cache: torch.Tensor) -> cpu.CpuLayer | None:
        compiled = self._compiled
        if compiled is None or compiled.serves(kv_cache.shape[2], kv_cache.dtype):
            return compiled
        logger.warning_once(
            "blocks of %d tokens in %s: the compiled kernel takes multiples of 16 in the model's "
            "own dtype, so the much slower PyTorch kernel runs; set --block-size 128 and "
            "--kv-cache-dtype auto",
            kv_cache.shape[2],
            kv_cache.dtype,
        )
        return None


def compile_layer(
    choice: str,
    device: torch.device,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    rules: ScoreRules,
) -> cpu.CpuLayer | None:
    """The compiled kernel for a layer, or None if PyTorch's is to run, with a warning if that is
    not what was asked for.

    Args:
        choice: the setting "kernel".
        device: where the model is.
        dtype: of activations.
        num_heads: query heads.
        num_kv_heads: key heads.
        head_size: dimensions of a head.
        rules: how products become scores.
    """
    if choice == "torch" or device.type != "cpu":
        return None
    if not cpu.serves(dtype, head_size):
        logger.warning_once(
            "heads of %d dimensions in %s: the compiled kernel takes multiples of 16 in float32, "
            "float16 or bfloat16, so the much slower PyTorch kernel runs",
            head_size,
            dtype,
        )
        return None
    try:
        return cpu.CpuLayer(num_heads, num_kv_heads, head_size, dtype, rules)
    except BuildError as error:
        logger.warning_once("the much slower PyTorch kernel runs: %s", error)
        return None
