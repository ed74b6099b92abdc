"""How fast LMINF is, beside what a user would pick instead.

`python -m benchmarks.kernels` times kernels, `python -m benchmarks.engines` whole engines, and
`python -m benchmarks.page` writes what they measured into docs/benchmarks.md.
"""
