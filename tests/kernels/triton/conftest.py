"""Tests of interpreted kernels are collected only in processes whose Triton interprets."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
