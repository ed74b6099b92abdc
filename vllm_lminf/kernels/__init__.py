"""Λ-attention over a paged KV cache: one interface, several kernels. Nothing here imports vLLM.

`base` says what a kernel is and what it is told; `registry` says which there are and chooses one.
`reference` is plain PyTorch, `cpu` is compiled from `cpu/csrc/`, and `triton`, `flash`, `hybrid`
and `xformers` are for GPUs. `oracle` is the definition, on contiguous tensors: no kernel imports
it, and it imports no kernel.
"""
