"""``vllm-lminf bench``: what Λ-attention costs beside vLLM's own attention."""
