"""What the tests of the block manager share."""

from collections.abc import Iterator

import pytest

from vllm_lminf import compat
from vllm_lminf.plugin import register


@pytest.fixture(autouse=True, scope="package")
def plugin() -> Iterator[None]:
    """Registered, so that vLLM finds the manager of a `LambdaSpec` as it does in an engine."""
    register()
    yield
    compat.uninstall()
