"""vLLM's side of memory: what a layer's KV cache is, and which blocks a request holds."""
