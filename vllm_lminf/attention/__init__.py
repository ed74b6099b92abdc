"""vLLM's side of attention: backend, metadata, implementation, and the model's rotary modules."""
