"""Λ-attention: one function, several implementations. Nothing here imports vLLM.

`reference` is the oracle, on contiguous tensors. `paged` computes the same over a paged KV cache.
No implementation imports the oracle, and the oracle imports no implementation.
"""
