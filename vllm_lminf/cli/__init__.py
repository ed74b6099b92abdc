"""The ``vllm-lminf`` console command."""
