"""Λ-attention over a paged KV cache for GPUs: fused Triton kernels, with torch and Triton alone.

`layer` is the way in. `attention` holds the kernel for decode and prefill, `reduce` merges what
several programs computed of one tile (split-KV), `merge` adds the global branch to a window
attention that another library computed, `cache` writes keys and values, and `plan` chooses sizes.
In layers that recall from the middle, `recaller` launches what `archive` keeps and `search` finds.
`angles`, `softmax` and `tiles` are their parts. `rotary` applies the rotary embedding before all
that.
"""
