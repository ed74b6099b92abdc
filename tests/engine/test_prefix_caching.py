"""Prefix caching in a real engine: what a hit needs, what it gives, and what is computed again."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm import LLM

from tests.engine.conftest import Engine, block_pool
from tests.engine.oracle_model import save_tiny_llama
from tests.engine.poison import assert_poison_changes_no_bit, poisoned
from tests.engine.traffic import (
    CacheView,
    alone,
    ask,
    assert_equal_to_oracle,
    finish,
    lambda_pattern,
    num_held,
    step,
    submit,
    tokens,
)

pytestmark = pytest.mark.engine

BLOCK = 16


@pytest.fixture(scope="class")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"), 4, 2, 64, trained_length=256)


class TestPromptOfManyPools:
    """20,000 tokens in a pool of 3,168. Two blocks are pinned, and the window of the query at
    19,968 reaches back over eight blocks."""

    LENGTH = 20_000
    BLOCK = 32
    CHUNK = 52 * BLOCK

    @pytest.fixture(scope="class")
    @classmethod
    def llm(cls, class_engine: Engine, model: Path) -> Iterator[LLM]:
        with class_engine(
            model,
            n_global=40,
            n_local=256,
            block_size=cls.BLOCK,
            max_num_batched_tokens=cls.CHUNK,
            max_model_len=30_000,
            num_gpu_blocks_override=100,
        ) as llm:
            yield llm

    def test_repeated_prompt(self, llm: LLM) -> None:
        """Twelve chunks and 32 tokens. The hit ends where the last chunk of the first run began, so
        that both runs end with the same step on the same keys: they are equal to the last bit. Were
        the chunks cut elsewhere, sums would run in another order."""
        prompt = tokens(self.LENGTH)
        with poisoned(llm) as poison:
            (first,) = ask(llm, [prompt], 100)
            assert first.num_cached == 0
            view = CacheView(llm, prompt)
            assert view.num_cached() < 100
            needed = view.needed(19_968)
            assert needed == [0, 1, *range(616, 624)]
            poison.num_restored = 0
            submit(llm, "again", prompt, 100)
            step(llm)
            # Of 624 blocks computed before, ten are held, and one more is written to.
            assert poison.num_restored == len(needed)
            assert num_held(llm) == {"again": len(needed) + 1}
            again = finish(llm)["again"]
        assert again.num_cached == 19_968
        assert again.generated == first.generated
        (clean,) = ask(llm, [prompt], 100)
        assert clean.num_cached == 19_968
        assert clean.generated == first.generated

    def test_longer_and_shorter_prompts(self, llm: LLM) -> None:
        """The pool has kept the blocks of the end: a longer prompt starts there, a much shorter one
        finds its own window gone."""
        prompt = tokens(self.LENGTH)
        ask(llm, [prompt], 1)
        for other in (prompt + tokens(500, seed=1), prompt[:19_900], prompt[:4000]):
            hit = CacheView(llm, other).longest_hit()
            (answer,) = ask(llm, [other], 4)
            assert answer.num_cached == hit
        assert hit == 2 * self.BLOCK


class TestHitLength:
    """Prompts of 517 tokens in a pool that keeps all 32 blocks of it. The hit of 512 needs the
    pinned blocks 0 and 1, and blocks 24 to 31 for the query at 512, which sees from 385 on."""

    LENGTH = 517

    @pytest.fixture(scope="class")
    @classmethod
    def llm(cls, class_engine: Engine, model: Path) -> Iterator[LLM]:
        with class_engine(
            model,
            n_global=20,
            n_local=128,
            block_size=BLOCK,
            max_num_batched_tokens=250,
            max_model_len=10_000,
            num_gpu_blocks_override=300,
        ) as llm:
            yield llm

    @pytest.mark.parametrize(
        ("evicted", "hit"),
        [
            ([], 512),
            ([0], 0),
            ([1], 16),  # One block is all that a hit of 16 needs.
            ([31], 496),
            ([24], 384),  # In every window from 25 blocks on; a hit of 24 blocks needs 16 to 23.
            ([28], 448),
            ([24, 20], 320),
            ([23], 512),
            (list(range(2, 24)), 512),
            ([*range(2, 24), 31], 32),  # No shorter hit has its window, but for that of two blocks.
            ([1, 31], 16),
        ],
        ids=str,
    )
    def test_after_eviction(self, llm: LLM, model: Path, evicted: list[int], hit: int) -> None:
        prompt = tokens(self.LENGTH)

        def scenario() -> tuple:
            (first,) = ask(llm, [prompt], 12)
            view = CacheView(llm, prompt)
            assert view.needed(512) == [0, 1, *range(24, 32)]
            for entry in evicted:
                view.evict(entry)
            assert view.longest_hit() == hit
            (second,) = ask(llm, [prompt], 12)
            assert (first.num_cached, second.num_cached) == (0, hit)
            assert second.tokens == first.tokens
            # What was computed again is in the cache again.
            (third,) = ask(llm, [prompt], 12)
            assert third.num_cached == 512
            assert third.tokens == first.tokens
            return first, second, third

        answers = assert_poison_changes_no_bit(llm, scenario)
        assert_equal_to_oracle(model, list(answers), lambda_pattern(llm))

    def test_blocks_in_the_middle_stay_free(self, llm: LLM) -> None:
        """A hit takes hold of what it needs, and leaves the rest to others."""
        prompt = tokens(self.LENGTH)
        ask(llm, [prompt], 1)
        submit(llm, "again", prompt, 8)
        step(llm)
        view = CacheView(llm, prompt)
        holders = [block.ref_cnt for entry in range(32) if (block := view.block(entry))]
        assert holders == [1] * 2 + [0] * 22 + [1] * 8
        finish(llm)

    @pytest.mark.parametrize("shared", [15, 16, 17, 200, 208, 500])
    def test_shared_prefix(self, llm: LLM, model: Path, shared: int) -> None:
        first, rest = tokens(self.LENGTH), tokens(150, seed=1)

        def scenario() -> list:
            return ask(llm, [first], 8) + ask(llm, [first[:shared] + rest], 8)

        answers = assert_poison_changes_no_bit(llm, scenario)
        assert answers[1].num_cached == shared // BLOCK * BLOCK
        assert_equal_to_oracle(model, answers, lambda_pattern(llm))
        assert [a.tokens for a in answers] == [
            a.tokens for a in alone(llm, [first, first[:shared] + rest], 8)
        ]

    def test_shared_middle_and_end(self, llm: LLM, model: Path) -> None:
        """Keys depend on all that came before, by position and, from the second layer on, by
        content: whoever differs earlier shares nothing."""
        first = tokens(self.LENGTH)
        others = {
            "the middle": (tokens(96, seed=1) + first[96:450] + tokens(50, seed=2), 0),
            "the middle, elsewhere": (tokens(64, seed=3) + first[96:450], 0),
            "all but the first token": ([first[0] ^ 1, *first[1:]], 0),
            "all but the first block's last": ([*first[:15], first[15] ^ 1, *first[16:]], 0),
            "all but the second block's first": ([*first[:16], first[16] ^ 1, *first[17:]], 16),
            "all but a token in the middle": ([*first[:250], first[250] ^ 1, *first[251:]], 240),
        }

        def scenario() -> list:
            # All others run side by side, and each finds what was there before it.
            return ask(llm, [first], 8) + ask(llm, [prompt for prompt, _ in others.values()], 8)

        answers = assert_poison_changes_no_bit(llm, scenario)
        hits = dict(zip(others, (a.num_cached for a in answers[1:]), strict=True))
        assert hits == {name: hit for name, (_, hit) in others.items()}
        assert_equal_to_oracle(model, answers, lambda_pattern(llm))

    def test_hit_on_blocks_of_a_running_request(self, llm: LLM, model: Path) -> None:
        """The first one frees what the second still holds: each block has one holder the less, and
        stays."""
        prompt = tokens(self.LENGTH)

        def scenario() -> list:
            submit(llm, "first", prompt, 160)
            answers = {}
            for _ in range(10):
                answers |= step(llm)
            submit(llm, "second", prompt, 40)
            step(llm)
            view = CacheView(llm, prompt)
            assert {view.block(entry).ref_cnt for entry in (0, 1, 25, 31)} == {2}
            submit(llm, "third", prompt[:500] + tokens(200, seed=1), 60)
            answers |= finish(llm)
            return [answers[name] for name in ("first", "second", "third")]

        answers = assert_poison_changes_no_bit(llm, scenario)
        assert [a.num_cached for a in answers] == [0, 512, 496]
        assert answers[1].tokens == answers[0].tokens[:40]
        assert_equal_to_oracle(model, answers, lambda_pattern(llm))


class TestSmallPool:
    """A pool of 70 blocks, which is 1,120 tokens: what others compute displaces what was cached."""

    @pytest.fixture(scope="class")
    @classmethod
    def llm(cls, class_engine: Engine, model: Path) -> Iterator[LLM]:
        with class_engine(
            model,
            n_global=20,
            n_local=128,
            block_size=BLOCK,
            max_num_batched_tokens=250,
            max_model_len=10_000,
            num_gpu_blocks_override=71,
        ) as llm:
            yield llm

    def test_eviction_by_traffic(self, llm: LLM) -> None:
        """The longer another prompt, the less is left of the first. The pool gives up the blocks
        that were freed first: those of the middle, then the window's, and the pinned ones last."""
        prompt = tokens(517)
        hits = []
        for length in (1, 600, 940, 960, 1060, 1070, 1080, 1090, 1100, 1120, 1500):
            assert llm.reset_prefix_cache()
            (first,) = ask(llm, [prompt], 8)
            ask(llm, [tokens(length, seed=length)], 1)
            hit = CacheView(llm, prompt).longest_hit()
            (again,) = ask(llm, [prompt], 8)
            assert again.num_cached == hit
            assert again.tokens == first.tokens
            hits.append(hit)
        assert hits == sorted(hits, reverse=True)
        # Once one block of the window is gone, no window but that of the first blocks is whole.
        assert set(hits) == {512, 32, 16, 0}

    def test_chat(self, llm: LLM, model: Path) -> None:
        """Turn n + 1 is turn n, its answer and a new question. All of the conversation is cached
        but its last token, whose answer nobody asked for, and what fills no block."""

        def scenario() -> list:
            turns, prompt = [], tokens(150)
            for turn in range(8):
                (answer,) = ask(llm, [prompt], 40)
                turns.append(answer)
                prompt = prompt + answer.tokens + tokens(110, seed=turn)
            return turns

        turns = assert_poison_changes_no_bit(llm, scenario)
        assert len(turns[-1].prompt) > block_pool(llm).num_gpu_blocks * BLOCK
        for before, turn in itertools.pairwise(turns):
            known = len(before.prompt) + len(before.tokens) - 1
            assert turn.num_cached == known // BLOCK * BLOCK
        assert_equal_to_oracle(model, turns, lambda_pattern(llm))

    def test_chats_side_by_side(self, llm: LLM, model: Path) -> None:
        """Eight conversations that go on in any order displace each other's blocks: a turn computes
        what the cache has lost, and no more."""

        def scenario() -> list:
            rng = random.Random(0)
            chats = [tokens(100 + 20 * chat, seed=chat) for chat in range(8)]
            turns = []
            for turn in range(24):
                chat = rng.randrange(8)
                known = CacheView(llm, chats[chat]).longest_hit()
                (answer,) = ask(llm, chats[chat : chat + 1], 10)
                assert answer.num_cached == known
                turns.append(answer)
                chats[chat] = [*answer.prompt, *answer.tokens, *tokens(60, seed=turn)]
            return turns

        turns = assert_poison_changes_no_bit(llm, scenario)
        lost = set()
        for number, turn in enumerate(turns):
            known = [len(t.prompt) + 9 for t in turns[:number] if t.prompt[:99] == turn.prompt[:99]]
            if known:
                lost.add(turn.num_cached < known[-1] // BLOCK * BLOCK)
        assert lost == {True, False}
        assert_equal_to_oracle(model, turns[-8:], lambda_pattern(llm))
