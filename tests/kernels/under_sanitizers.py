"""Runs tests of the compiled kernels with AddressSanitizer and UBSan watching every access.

A process of its own, started with libasan preloaded: see `test_sanitizers.py`.
"""

import sys

import pytest

from vllm_lminf.kernels.native import build

if __name__ == "__main__":
    build.FLAGS = (
        *(flag for flag in build.FLAGS if flag != "-O3"),
        *("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    )
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
