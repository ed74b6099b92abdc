"""The middle recalled in a real engine: the oracle's numbers, whatever runs beside it or before."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM

from tests.engine.conftest import Engine, archive_manager, block_pool, kv_cache_manager
from tests.engine.oracle_model import save_tiny_llama
from tests.engine.poison import assert_poison_changes_no_bit, poisoned
from tests.engine.traffic import (
    alone,
    ask,
    assert_equal_to_oracle,
    block_manager,
    chunks_of,
    finish,
    lambda_pattern,
    num_held,
    step,
    submit,
    tokens,
)
from vllm_lminf.cli.main import main
from vllm_lminf.middle import ALL_ROWS, Middle
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin.config import LambdaConfig

pytestmark = pytest.mark.engine

BLOCK = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, so that some recall and some don't."""
    return save_tiny_llama(
        tmp_path_factory.mktemp("model"), 4, 2, 32, trained_length=64, num_layers=4
    )


def settings(middle: Middle, **others: Any) -> dict[str, Any]:
    """The settings that say the same."""
    return {
        "middle_top_k": middle.top_k,
        "middle_rows": "all" if middle.rows == ALL_ROWS else middle.rows,
        "middle_from_layer": middle.from_layer,
        "middle_distance": middle.distance,
        "middle_unit": "token" if middle.block_size == 1 else middle.block_size,
        "archive_gib": 0.0625,
        **others,
    }


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize(
    "middle",
    [
        Middle(4, distance=30, rows=1, from_layer=2),
        Middle(3, distance=200, rows=ALL_ROWS, from_layer=1),
        Middle(2, distance=20, rows=9, from_layer=3, block_size=16),
    ],
    ids=["tokens", "all rows", "blocks"],
)
def test_equal_to_the_oracle(engine: Engine, model: Path, kernel: str, middle: Middle) -> None:
    """Prompts in one chunk and in several, below and beyond the window."""
    prompts = [tokens(n, seed=n) for n in (1, 40, 47, 48, 130, 200)]
    with engine(
        model,
        n_global=5,
        n_local=40,
        kernel=kernel,
        middle=settings(middle),
        block_size=BLOCK,
        max_num_batched_tokens=128,
        max_model_len=300,
    ) as llm:
        answers = ask(llm, prompts, 24)
        assert_equal_to_oracle(model, answers, lambda_pattern(llm), middle)


class TestOneEngine:
    """Prompts of hundreds of tokens, of which the last 20 look; blocks of 16."""

    MIDDLE = Middle(4, distance=30, rows=20, from_layer=2)

    @pytest.fixture(scope="class")
    @classmethod
    def llm(cls, class_engine: Engine, model: Path) -> Iterator[LLM]:
        with class_engine(
            model,
            n_global=5,
            n_local=40,
            middle=settings(cls.MIDDLE),
            block_size=BLOCK,
            max_num_batched_tokens=128,
            max_model_len=1000,
        ) as llm:
            yield llm

    def test_whatever_is_in_the_batch(self, llm: LLM, model: Path) -> None:
        prompts = [tokens(n, seed=n) for n in (300, 97, 5, 260, 128, 61, 350, 144)]
        together = ask(llm, prompts, 16)
        assert_equal_to_oracle(model, together, lambda_pattern(llm), self.MIDDLE)
        assert [a.tokens for a in together] == [a.tokens for a in alone(llm, prompts, 16)]

    def test_however_prompts_are_cut(self, llm: LLM, model: Path) -> None:
        prompt = tokens(300)
        for size in (128, 50, 17):
            assert llm.reset_prefix_cache()
            with chunks_of(llm, size):
                answers = ask(llm, [prompt], 16)
            assert_equal_to_oracle(model, answers, lambda_pattern(llm), self.MIDDLE)

    def test_a_repeated_prompt(self, llm: LLM, model: Path) -> None:
        """All of its blocks are found again: the same rows looked."""
        prompt = tokens(300)

        def scenario() -> list:
            return ask(llm, [prompt], 16) + ask(llm, [prompt], 16)

        answers = assert_poison_changes_no_bit(llm, scenario)
        assert [a.num_cached for a in answers] == [0, 288]
        assert_equal_to_oracle(model, answers, lambda_pattern(llm), self.MIDDLE)

    @pytest.mark.parametrize("more", [1, 100])
    def test_the_next_turn(self, llm: LLM, model: Path, more: int) -> None:
        """Of the first turn's blocks those are taken over in which no row looked: 280 rows of the
        prompt, which are 17 blocks."""
        prompt = tokens(300)

        def scenario() -> list:
            (first,) = ask(llm, [prompt], 16)
            turn = prompt + first.tokens + tokens(more, seed=1)
            return [first, *ask(llm, [turn], 16)]

        answers = assert_poison_changes_no_bit(llm, scenario)
        assert [a.num_cached for a in answers] == [0, 272]
        assert_equal_to_oracle(model, answers, lambda_pattern(llm), self.MIDDLE)

    def test_the_next_turn_inside_the_window(self, llm: LLM, model: Path) -> None:
        """No row of 45 tokens had a middle: what was generated is found again too."""
        prompt = tokens(20)

        def scenario() -> list:
            (first,) = ask(llm, [prompt], 25)
            turn = prompt + first.tokens + tokens(100, seed=1)
            return [first, *ask(llm, [turn], 16)]

        answers = assert_poison_changes_no_bit(llm, scenario)
        assert [a.num_cached for a in answers] == [0, 32]
        assert_equal_to_oracle(model, answers, lambda_pattern(llm), self.MIDDLE)

    def test_a_prefix_of_what_is_cached(self, llm: LLM, model: Path) -> None:
        """Its own last rows look, and those of the longer prompt at their places didn't: its 230
        first rows are 14 blocks."""
        prompt = tokens(300)

        def scenario() -> list:
            return ask(llm, [prompt], 1) + ask(llm, [prompt[:250]], 16)

        answers = assert_poison_changes_no_bit(llm, scenario)
        assert [a.num_cached for a in answers] == [0, 224]
        assert_equal_to_oracle(model, answers, lambda_pattern(llm), self.MIDDLE)

    def test_pages_and_blocks_held(self, llm: LLM) -> None:
        """A page for every block of the sequence; of the device's blocks as many as ever."""
        assert llm.reset_prefix_cache()
        most = LambdaPattern(5, 40, 40).max_blocks_held(BLOCK, 128, 1000)
        assert block_manager(llm).max_admission_blocks_per_request == most
        submit(llm, "long", tokens(700), 4)
        for _ in range(6):
            step(llm)
        assert archive_manager(llm).num_pages_held == 44
        assert num_held(llm)["long"] <= most
        finish(llm)
        assert archive_manager(llm).num_pages_held == 0

    def test_aborted_requests_leave_nothing(self, llm: LLM) -> None:
        with poisoned(llm):
            submit(llm, "aborted", tokens(500), 50)
            for _ in range(3):
                step(llm)
            (name,) = archive_manager(llm).req_to_blocks
            llm.llm_engine.abort_request([name], internal=True)
            finish(llm)
            ask(llm, [tokens(200, seed=3)], 4)


class TestSmallArchive:
    """An archive of 40 pages of 16 tokens: two of these requests fit, and not four."""

    MIDDLE = Middle(4, distance=30, rows=20, from_layer=2)
    PAGES = 40

    @pytest.fixture(scope="class")
    @classmethod
    def llm(cls, class_engine: Engine, model: Path) -> Iterator[LLM]:
        # Three layers, two key heads of 32: keys and values, codes, scales and radii, centres.
        page = 3 * 2 * (16 * (2 * 32 * 4 + 32 + 8) + 32 * 4)
        gib = (cls.PAGES + 1) * page / (1 << 30)
        with class_engine(
            model,
            n_global=5,
            n_local=40,
            middle=settings(cls.MIDDLE, archive_gib=gib),
            block_size=BLOCK,
            max_num_batched_tokens=128,
            max_model_len=400,
        ) as llm:
            yield llm

    def test_all_are_answered_as_if_alone(self, llm: LLM, model: Path) -> None:
        assert archive_manager(llm).kv_cache_spec.num_pages == self.PAGES + 1
        prompts = [tokens(200 + 11 * n, seed=n) for n in range(12)]

        def scenario() -> list:
            return ask(llm, prompts, 40)

        together = assert_poison_changes_no_bit(llm, scenario)
        assert_equal_to_oracle(model, together, lambda_pattern(llm), self.MIDDLE)
        assert [a.tokens for a in together] == [a.tokens for a in alone(llm, prompts, 40)]

    def test_it_is_what_was_planned(
        self, llm: LLM, model: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """`vllm-lminf plan`, before anything started."""
        words = ["plan", str(model), "--max-model-len", "400", "--memory", str(1 << 28)]
        settings = {"n_global": 5, "middle_top_k": 4, "middle_rows": 20, "middle_from_layer": 2}
        settings["archive_gib"] = LambdaConfig.of(llm.llm_engine.vllm_config).archive_gib
        for name, value in settings.items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        words += ["--n-local", "40", "--middle-distance", "30", "--json"]
        words += ["--block-size", str(BLOCK), "--max-num-batched-tokens", "128"]
        assert main([*words, "--dtype", "float32", "--skip-tokenizer-init"]) == 0
        plan = json.loads(capsys.readouterr().out)
        full, _, middle = plan["rows"]
        config, pool = llm.llm_engine.vllm_config, block_pool(llm)
        assert plan["max_in_flight_tokens"] == config.max_in_flight_tokens
        assert middle["pool_blocks"] == full["pool_blocks"] == pool.get_num_free_blocks()
        device, archive = kv_cache_manager(llm).kv_cache_config.kv_cache_groups
        held = device.kv_cache_spec.max_admission_blocks_per_request(
            config.max_in_flight_tokens, 400
        )
        assert middle["request_blocks"] == held < full["request_blocks"] == 25
        assert middle["archive_pages"] == archive_manager(llm).num_pages == self.PAGES
        assert middle["archive_page_bytes"] == 3 * archive.kv_cache_spec.page_size_bytes
        assert middle["requests"] == 1

    def test_hits_end_where_a_page_is_gone(self, llm: LLM) -> None:
        """The pool has blocks enough for all of them, and the archive hasn't."""
        assert llm.reset_prefix_cache()
        prompts = [tokens(320, seed=n) for n in range(3)]
        for prompt in prompts:
            ask(llm, [prompt], 1)
        assert block_pool(llm).get_num_free_blocks() > 3 * 20
        (answer,) = ask(llm, [prompts[0]], 1)
        assert answer.num_cached < 304
        (clean,) = alone(llm, [prompts[0]], 1)
        assert answer.tokens == clean.tokens


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"archive_gib": 0.0001}, ["archive_gib is 0.0001", "max_model_len is 300"]),
        ({"archive_gib": 1e6}, ["GiB of memory in all"]),
    ],
    ids=["too small", "too large"],
)
def test_refused(engine: Engine, model: Path, others: dict, words: list[str]) -> None:
    middle = settings(Middle(4, distance=30, rows=1), **others)
    with (
        pytest.raises(Exception, match="archive_gib") as error,
        engine(model, n_local=40, middle=middle, block_size=BLOCK, max_model_len=300),
    ):
        pass
    for word in words:
        assert word in str(error.value)
