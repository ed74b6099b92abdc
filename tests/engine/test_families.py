"""Every model family through vLLM beyond its trained length, against the oracle in Hugging Face's
code of that family, in float32; and the families that are refused.

The tolerance is test_exactness's, for its reason. A Λ that is off by one token in any of its three
numbers moves a log-probability by 3e-3 or more in every family with full attention.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.engine.conftest import Engine
from tests.engine.families import FAMILIES, REFUSED_FAMILIES, TRAINED_LENGTH, OracleModel
from tests.engine.test_exactness import TOLERANCE, engine_logprobs, random_prompts
from tests.engine.test_middle import settings
from tools.families_table import MEASURED, REFUSED, SERVED, Row, read_page, save
from vllm_lminf.errors import UnsupportedError
from vllm_lminf.middle import Middle
from vllm_lminf.pattern import LambdaPattern

pytestmark = pytest.mark.engine

PATTERN = LambdaPattern(n_global=10, n_local=48, distance_limit=TRAINED_LENGTH)


@pytest.fixture(scope="module")
def measured() -> Iterator[dict[str, Row]]:
    """Rows of docs/families.md, left by the tests that pass; saved if all of them did."""
    MEASURED.unlink(missing_ok=True)
    rows: dict[str, Row] = {}
    yield rows
    families = [*FAMILIES, *REFUSED_FAMILIES]
    if set(rows) == set(families):
        save(rows[family] for family in families)


@pytest.mark.parametrize("family", FAMILIES)
def test_oracle_is_the_model_inside_the_window(tmp_path: Path, family: str) -> None:
    """Where the Λ hides nothing, the oracle must be what Hugging Face computes: this checks scale,
    rotation, soft-capping, sinks and the convention of native windows."""
    model = OracleModel(FAMILIES[family], FAMILIES[family].save(tmp_path / "model"))
    (prompt,) = random_prompts([PATTERN.n_local])
    expected = model.logprobs(prompt, pattern=None)
    torch.testing.assert_close(model.logprobs(prompt, PATTERN), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_engine_equals_oracle(
    engine: Engine, tmp_path: Path, measured: dict[str, Row], family: str
) -> None:
    """Prompts up to five trained lengths in one batch, in chunks that cut through the windows."""
    path = FAMILIES[family].save(tmp_path / "model")
    model = OracleModel(FAMILIES[family], path)
    with engine(
        path,
        n_global=PATTERN.n_global,
        n_local=PATTERN.n_local,
        distance_limit=PATTERN.distance_limit,
        block_size=16,
        max_num_batched_tokens=48,
        max_model_len=1000,
    ) as llm:
        difference = 0.0
        for tokens, logprobs in engine_logprobs(llm, random_prompts([1, 63, 64, 65, 150, 300]), 8):
            expected = model.logprobs(tokens, PATTERN)
            assert logprobs.shape == expected.shape
            assert torch.isfinite(logprobs).all()
            torch.testing.assert_close(logprobs, expected, rtol=0, atol=TOLERANCE)
            difference = max(difference, float((logprobs - expected).abs().max()))
        measured[family] = Row.of_engine(FAMILIES[family].title, llm, difference)


# Windows beside full layers, and soft-capping; a partial and interleaved rotation; a turn the other
# way round; a magnitude.
RECALLING = ["gemma-2", "glm", "nanochat", "phi-4-mini"]


@pytest.mark.parametrize("family", RECALLING)
def test_the_middle_equals_the_oracles(engine: Engine, tmp_path: Path, family: str) -> None:
    path = FAMILIES[family].save(tmp_path / "model")
    model = OracleModel(FAMILIES[family], path)
    middle = Middle(4, distance=30, rows=20)
    with engine(
        path,
        n_global=PATTERN.n_global,
        n_local=PATTERN.n_local,
        distance_limit=PATTERN.distance_limit,
        middle=settings(middle),
        block_size=16,
        max_num_batched_tokens=48,
        max_model_len=1000,
    ) as llm:
        for tokens, logprobs in engine_logprobs(llm, random_prompts([1, 65, 150, 300]), 8):
            expected = model.logprobs(tokens, PATTERN, middle, len(tokens) - 8)
            torch.testing.assert_close(logprobs, expected, rtol=0, atol=TOLERANCE)
        plain = model.logprobs(tokens, PATTERN)
        assert float((plain - expected).abs().max()) > 100 * TOLERANCE


@pytest.mark.parametrize("family", REFUSED_FAMILIES)
def test_refusal_names_layers_and_reason(
    engine: Engine, tmp_path: Path, measured: dict[str, Row], family: str
) -> None:
    """Through a real engine's start, with weights of vLLM's own making where it comes to them."""
    refused = REFUSED_FAMILIES[family]
    path = refused.save(tmp_path / "model")
    with (
        pytest.raises(ValueError, match=refused.message) as error,
        engine(path, max_model_len=refused.max_model_len, load_format="dummy"),
    ):
        pass
    assert isinstance(error.value, UnsupportedError) == (refused.status == REFUSED)
    model_type = json.loads((path / "config.json").read_text())["model_type"]
    measured[family] = Row(refused.title, model_type, refused.encoding, status=refused.status)


def test_page_has_what_was_measured(measured: dict[str, Row]) -> None:
    """The table is rewritten by `make families`; how far a family is off differs by machine."""
    rows = {row.family: row for row in read_page()}
    assert list(rows) == [f.title for f in (FAMILIES | REFUSED_FAMILIES).values()]
    for row in measured.values():
        assert rows[row.family].without_difference() == row.without_difference()
    served = [float(row.difference) for row in rows.values() if row.status == SERVED]
    assert len(served) == len(FAMILIES)
    assert max(served) <= TOLERANCE
