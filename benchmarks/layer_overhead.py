"""Microseconds of Python that LMINF adds to each layer of a decode step of one request, on a CPU.

vLLM's two calls of a layer are timed with the compiled functions left out: what remains is the way
from vLLM's attention layer to the kernel. The first layer of a step also makes what all share.
"""

import argparse
import time
from typing import Any

import pandas as pd
import torch
from torch import nn
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs

from benchmarks.report import spread
from vllm_lminf.kernels.base import DeviceBatch
from vllm_lminf.plugin.backend import LambdaAttentionImpl, LambdaMetadata
from vllm_lminf.plugin.rotary import Rotary
from vllm_lminf.rope import RotarySpec, RotationTables

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 9, 3, 64
BLOCK_SIZE, SEQ_LEN = 128, 1000


def make_layers(model: str, count: int) -> list[LambdaAttentionImpl]:
    """Layers of an engine, ready to run, whose kernel returns at once."""
    engine = EngineArgs(model=model, attention_backend="LMINF", dtype="bfloat16")
    config = engine.create_engine_config()
    inv_freq = 10000.0 ** -(torch.arange(0, HEAD_SIZE, 2, dtype=torch.float64) / HEAD_SIZE)
    rotary = Rotary(RotarySpec(inv_freq, is_neox_style=True), RotationTables(inv_freq))
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.zeros(1))
    impls = []
    with set_current_vllm_config(config):
        for number in range(count):
            impl = LambdaAttentionImpl(NUM_HEADS, HEAD_SIZE, HEAD_SIZE**-0.5, NUM_KV_HEADS)
            part = nn.Module()
            part.impl = impl
            holder.add_module(str(number), part)
            impl.process_weights_after_loading(torch.bfloat16)
            impl.make_ready(rotary)
            kernel: Any = impl.kernel_for(BLOCK_SIZE, torch.bfloat16)
            kernel._attend = kernel._write = lambda *_: None
            impls.append(impl)
    return impls


def time_steps(impls: list[LambdaAttentionImpl], steps: int) -> pd.DataFrame:
    """Seconds of each layer in each step: a row a step, a column a layer."""
    blocks = -(-SEQ_LEN // BLOCK_SIZE)
    shape = 1 + blocks, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE
    caches = [torch.zeros(shape, dtype=torch.bfloat16) for _ in impls]
    query = torch.zeros(1, NUM_HEADS, HEAD_SIZE, dtype=torch.bfloat16)
    key, value = torch.zeros(2, 1, NUM_KV_HEADS, HEAD_SIZE, dtype=torch.bfloat16)
    start, length = torch.tensor([0, 1]).int(), torch.tensor([SEQ_LEN]).int()
    table = torch.arange(1, 1 + blocks).int()[None]
    slots = torch.tensor([BLOCK_SIZE])
    layer: Any = nn.Module()
    rows = []
    for _ in range(steps):
        metadata = LambdaMetadata(1, DeviceBatch(start, length, table, 1))
        row = []
        for impl, cache in zip(impls, caches, strict=True):
            begin = time.perf_counter()
            impl.do_kv_cache_update(layer, key, value, cache, slots)
            impl.forward(layer, query, key, value, cache, metadata, query)
            row.append(time.perf_counter() - begin)
        rows.append(row)
    return pd.DataFrame(rows[steps // 10 :])  # what is made once isn't counted


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layer_overhead", description=__doc__
    )
    parser.add_argument("--model", required=True, help="folder of a checkpoint, for its settings")
    parser.add_argument("--layers", type=int, default=30, help="layers of a step (30)")
    parser.add_argument("--steps", type=int, default=2000, help="steps that are timed (2000)")
    args = parser.parse_args()
    seconds = 1e6 * time_steps(make_layers(args.model, args.layers), args.steps)
    print(f"first layer of a step: {spread(seconds[0])} µs")
    print(f"each other layer:      {spread(seconds.iloc[:, 1:].median(axis=1))} µs")


if __name__ == "__main__":
    main()
