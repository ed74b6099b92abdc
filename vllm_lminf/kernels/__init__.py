"""Λ-attention: one function, several implementations. Nothing here imports vLLM.

`reference` is the oracle, on contiguous tensors. `paged` computes the same over a paged KV cache,
in plain PyTorch; `cpu` does so by the compiled kernels in `csrc/`; `triton`, `xformers` and
`flash` do so on GPUs. `choice` says which of them runs where.
No implementation imports the oracle, and the oracle imports no implementation.
"""
