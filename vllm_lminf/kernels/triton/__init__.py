"""Λ-attention over a paged KV cache for GPUs: fused Triton kernels, with torch and Triton alone.

`layer` is the way in. `attention` holds the kernel for decode and prefill, `reduce` joins what
several programs computed of one tile, `join` adds the global branch to a window attention that
another library computed, `cache` writes keys and values, and `plan` chooses sizes. `angles`,
`softmax` and `tiles` are their parts. `rotary` turns queries and keys before all that.
"""
