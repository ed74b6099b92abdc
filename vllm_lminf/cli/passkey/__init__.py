"""``vllm-lminf eval passkey``: which of the numbers hidden in a long text a model can repeat."""
