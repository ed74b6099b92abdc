"""Memory of the plain torch module, forward and backward, up to 65536 tokens. Runs on Linux.

Attention that forms every score needs a matrix of tokens × tokens for each head, and its softmax
beside it; LMInfinite's memory grows with the tokens alone.
"""

import re
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from vllm_lminf import LMInfinite

D_MODEL, NUM_HEADS, LENGTHS = 256, 4, (4096, 8192, 16384, 32768, 65536)


def peak_mib() -> float:
    """The most memory that this process has held at any time."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024


def main() -> None:
    """Run both passes at every length, the longest last, and print the table."""
    attention = LMInfinite(D_MODEL, n_global=10, l_pretrain=512, num_heads=NUM_HEADS)
    table = Table("tokens", "LMInfinite, peak MiB", "tokens × tokens, MiB", title=str(attention))
    attention(*torch.randn(3, 1, 512, D_MODEL))  # what the first call loads is not counted
    before = peak_mib()
    for tokens in LENGTHS:
        q, k, v = (torch.randn(1, tokens, D_MODEL, requires_grad=True) for _ in range(3))
        attention(q, k, v).sum().backward()
        matrix = NUM_HEADS * tokens**2 * q.element_size() / 2**20
        table.add_row(str(tokens), f"{peak_mib() - before:.0f}", f"{matrix:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
