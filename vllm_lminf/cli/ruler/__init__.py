"""``vllm-lminf eval ruler``: synthetic tasks of RULER that need no data."""
