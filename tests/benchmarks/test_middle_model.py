"""The studied model against the oracle."""

from pathlib import Path

import pytest
import torch

from benchmarks.middle_model import StudiedLlama, attend
from tests.engine.oracle_model import oracle_distributions, save_tiny_llama
from tests.kernels.batches import make_rotary
from vllm_lminf.kernels.oracle import lambda_attention
from vllm_lminf.middle import ALL_ROWS, Middle
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.rope import RotationTables

MIDDLES = [
    None,
    Middle(3, distance=20, rows=ALL_ROWS),
    Middle(3, distance=20, rows=17),
    Middle(2, distance=20, rows=ALL_ROWS, block_size=8),
    Middle(1000, distance=20, rows=ALL_ROWS),
]


@pytest.mark.parametrize("middle", MIDDLES, ids=str)
@pytest.mark.parametrize("num_queries", [1, 60, 400])
@pytest.mark.parametrize("pattern", [(5, 30, 40), (0, 30, 30), (5, 1000, 1000)], ids=str)
def test_attention(pattern: tuple[int, int, int], num_queries: int, middle: Middle | None) -> None:
    """400 queries are more than a tile, and the first of them have no middle."""
    generator = torch.Generator().manual_seed(num_queries)
    query = torch.randn(num_queries, 6, 64, generator=generator)
    key, value = torch.randn(2, 400, 2, 64, generator=generator)
    rotary = make_rotary(64)
    rows = {} if middle is None else {"middle": middle, "prompt_len": 390}
    expected = lambda_attention(
        query,
        key,
        value,
        LambdaPattern(*pattern),
        scale=0.2,
        rotary=rotary,
        query_start=400 - num_queries,
        **rows,
    )
    output = attend(
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        LambdaPattern(*pattern),
        RotationTables(rotary.inv_freq),
        0.2,
        middle,
        0 if middle is None else middle.first_row(390),
    )
    torch.testing.assert_close(output.transpose(0, 1), expected, rtol=0, atol=1e-4)


def test_a_sequence_in_chunks(tmp_path: Path) -> None:
    """The whole model, also after its cache was cut back."""
    path = save_tiny_llama(tmp_path, num_heads=4, num_kv_heads=2, head_size=32)
    token_ids = torch.randint(512, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    pattern = LambdaPattern(3, 40, 50)
    expected = oracle_distributions(path, token_ids, pattern, torch.float32)[-30:]
    model = StudiedLlama(path, pattern)
    model.run(token_ids[:100], chunk=33)
    model.run(token_ids[:20], Middle(4, distance=30, rows=ALL_ROWS))
    model.go_back(100)
    logits = model.run(token_ids[100:-1], num_logits=30)
    assert model.num_tokens == 149
    torch.testing.assert_close(logits.double().log_softmax(-1), expected, rtol=0, atol=1e-3)
    seen = list(model.watch(token_ids[-1:]))
    assert [each.layer for each in seen] == [1, 2]
    assert seen[0].query.shape == (1, 4, 32)
    assert seen[0].key.shape == (150, 2, 32)


def test_layers_from_the_first_that_recalls(tmp_path: Path) -> None:
    path = save_tiny_llama(tmp_path, num_heads=4, num_kv_heads=2, head_size=32)
    token_ids = torch.randint(512, (80,), generator=torch.Generator().manual_seed(0)).tolist()
    model = StudiedLlama(path, LambdaPattern(3, 40, 50))

    def logits(from_layer: int | None) -> torch.Tensor:
        model.start()
        if from_layer is None:
            return model.run(token_ids)
        return model.run(token_ids, Middle(4, 30, ALL_ROWS, from_layer))

    plain, second, first = logits(None), logits(2), logits(1)
    assert torch.equal(logits(3), plain)
    assert not torch.equal(second, plain)
    assert not torch.equal(second, first)
