"""What the tests of the block manager share."""

import pytest

from vllm_lminf.plugin import register


@pytest.fixture(autouse=True, scope="package")
def plugin() -> None:
    """Registered, so that vLLM finds the manager of a `LambdaSpec` as it does in an engine."""
    register()
