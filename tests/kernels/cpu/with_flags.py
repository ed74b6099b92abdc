"""Runs tests of the compiled kernels, built with other flags of the compiler than usual.

A process of its own: ``python -m tests.kernels.cpu.with_flags "-march=x86-64-v3" TESTS...``; see
`test_variants.py`.
"""

import sys

import pytest

from vllm_lminf.kernels.cpu import build

if __name__ == "__main__":
    build.FLAGS = (*build.FLAGS, *sys.argv[1].split())
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
