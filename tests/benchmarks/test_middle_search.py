"""What the study of searches counts, on keys that are made up; and its page."""

from pathlib import Path

import pytest
import torch

from benchmarks import middle_search, studies
from benchmarks.middle_model import StudiedLlama
from tests.benchmarks.byte_tokenizer import ByteTokenizer
from tests.engine.oracle_model import save_tiny_llama


def drawn(num_keys: int = 600) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 64, generator=generator), torch.randn(num_keys, 64, generator=generator)


def test_no_way_is_more_certain_than_it_may_be() -> None:
    """Every estimate is within its bound of the product, and every bound of a block above all of
    its products."""
    query, key = drawn()
    exact = query @ key.T
    for name, bits, estimate, bound in middle_search.index_ways(query, key):
        assert ((estimate - exact).abs() <= bound + 1e-4).all(), (name, bits)
    for size in middle_search.BLOCK_SIZES:
        of_blocks = exact[:, : 600 // size * size].unflatten(-1, (-1, size)).amax(dim=-1)
        for name, by, is_bound in middle_search.block_ways(query, key, size):
            assert by.shape == of_blocks.shape
            assert not is_bound or (by >= of_blocks - 1e-4).all(), (name, size)


def test_what_is_counted() -> None:
    """Four keys by estimate, of which the second best is the best; bounds reach the third."""
    estimate = torch.tensor([[4.0, 3.0, 2.0, 1.0] + [-9.0] * 300])
    exact = torch.tensor([[3.5, 3.6, 2.5, 0.5] + [-9.0] * 300])
    rows = middle_search.searched(estimate, torch.full_like(estimate, 1.6), exact, top_k=1)
    assert rows["needed"].tolist() == [3]
    assert rows["rank"].tolist() == [[1]]
    assert rows["certified 32"].tolist() == [True]
    rows = middle_search.searched(estimate, torch.full_like(estimate, 50.0), exact, top_k=1)
    assert rows["needed"].tolist() == [304]
    assert rows["certified 256"].tolist() == [False]
    assert middle_search.summary(rows, 304)["needed share"] == 1.0


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_tiny_llama(tmp_path / "tiny", num_heads=4, num_kv_heads=2, head_size=32)
    monkeypatch.setattr(StudiedLlama, "tokenizer", ByteTokenizer())
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{studies.BEGIN}\nold\n{studies.END}\nafter\n", encoding="utf-8")
    arguments = f"--model {path} --page {page} --tokens 500 --queries 2 --n-local 40 --from-layer 2"
    middle_search.main(arguments.split())
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert text.count("**Share of") == 5
    assert (tmp_path / "page" / "results.json").is_file()


def test_a_text_without_a_middle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="too few"):
        middle_search.main(["--model", str(tmp_path), "--tokens", "2100"])
