"""What the tests for a device need: torch, Triton and pytest. Runs without a device."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
OTHERS = ("hypothesis", "matplotlib", "rich", "transformers", "vllm", "xformers")
COLLECT = f"""if True:
    import sys

    class Without:
        def __init__(self, finder):
            self.finder = finder

        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {OTHERS}:
                return None
            return self.finder.find_spec(name, path, target)

    sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
    import pytest
    sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_they_can_be_collected() -> None:
    command = [sys.executable, "-c", COLLECT, str(ROOT / "tests" / "gpu")]
    # Plugins of pytest are what an environment happens to have.
    environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("test_triton", "test_flash", "test_xformers", "test_engine", "test_middle"):
        assert f"{name}.py::" in result.stdout
