"""Prompts of an exact length, keys that stay what they are, and which answers count."""

from itertools import pairwise

import pytest
from transformers import AutoTokenizer

from tests.server.byte_tokenizer import save_byte_tokenizer
from vllm_lminf.cli.passkey.task import (
    ANSWER_TOKENS,
    FILLER,
    HEAD,
    NEEDLE,
    QUESTION,
    Cell,
    PromptBuilder,
    Tokenizer,
    cells_of,
    even_depths,
    is_found,
)

LENGTHS = (256, 1023, 1024, 1025, 4096)
DEPTHS = (0.0, 0.25, 0.5, 1.0)


@pytest.fixture(scope="module")
def trained(model_path: str) -> Tokenizer:
    """A byte-pair tokenizer that takes digits one by one."""
    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(model_path)
    return tokenizer


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A token for every byte: sentences of 12 to 22 tokens."""
    folder = tmp_path_factory.mktemp("bytes")
    save_byte_tokenizer(folder, 512)
    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer


@pytest.fixture(params=["trained", "of_bytes"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("length", [n for n in LENGTHS if n > 256])
def test_prompt_and_answer_have_exactly_the_length(tokenizer: Tokenizer, length: int) -> None:
    prompts = PromptBuilder(tokenizer)
    for depth in DEPTHS:
        assert len(prompts.prompt(Cell(length, depth, "51234"))) + ANSWER_TOKENS == length


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_tokens_are_those_of_the_text(trained: Tokenizer, length: int, depth: float) -> None:
    tokens = PromptBuilder(trained).prompt(Cell(length, depth, "90071"))
    text = trained.decode(tokens)
    assert trained.encode(text) == tokens
    assert text.count("90071") == 2
    assert text.startswith(HEAD)
    assert text.endswith(QUESTION)
    rest = text.removeprefix(HEAD).removesuffix(QUESTION).replace(NEEDLE.format(key="90071"), "")
    for sentence in FILLER:
        rest = rest.replace(sentence, "")
    assert not rest.strip()  # whole sentences, and nothing else


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_key_stands_at_its_depth(tokenizer: Tokenizer, depth: float) -> None:
    text = tokenizer.decode(PromptBuilder(tokenizer).prompt(Cell(4096, depth, "12345")))
    before, after = text.removeprefix(HEAD).removesuffix(QUESTION).split(NEEDLE.format(key="12345"))
    assert len(before) / (len(before) + len(after)) == pytest.approx(depth, abs=0.01)
    assert depth not in (0.0, 1.0) or not (before, after)[int(depth)].strip()


def test_prompts_of_a_length_begin_like_those_before_them(trained: Tokenizer) -> None:
    """Each up to its own key."""
    cells = list(cells_of([1024, 2048], [0.0, 0.5, 1.0], keys=2, seed=0))
    places = [(2048, 1.0), (2048, 0.5), (2048, 0.0), (1024, 1.0), (1024, 0.5), (1024, 0.0)]
    assert [(cell.length, cell.depth) for cell in cells[::2]] == places
    prompts = PromptBuilder(trained)
    for early, late in pairwise(cells):
        if early.length == late.length:
            pairs = zip(prompts.prompt(early), prompts.prompt(late), strict=True)
            same = next(i for i, (a, b) in enumerate(pairs) if a != b)
            assert same > late.depth * (late.length - 100)


def test_keys_depend_on_their_own_place_alone() -> None:
    few = list(cells_of([1024], [0.5], keys=2, seed=7))
    many = list(cells_of([512, 1024], [0.0, 0.5, 1.0], keys=3, seed=7))
    assert set(few) <= set(many)
    assert set(few).isdisjoint(cells_of([1024], [0.5], keys=2, seed=8))
    assert all(len(cell.key) == 5 and cell.key.isdigit() for cell in many)


def test_depths_are_even() -> None:
    assert even_depths(1) == [0.5]
    assert even_depths(3) == [0.1667, 0.5, 0.8333]
    assert even_depths(10)[:2] == [0.05, 0.15]


def test_a_length_without_room_is_refused(trained: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"no whole sentences fill 64 tokens.*--lengths"):
        PromptBuilder(trained).prompt(Cell(64, 0.5, "12345"))


def test_a_tokenizer_that_changes_digits_is_refused(trained: Tokenizer) -> None:
    class Careless:
        encode = trained.encode

        def decode(self, token_ids: list[int]) -> str:
            return trained.decode(token_ids).replace("1", "7")

    with pytest.raises(ValueError, match="digits of 12345"):
        PromptBuilder(Careless()).prompt(Cell(1024, 0.5, "12345"))


def test_a_tokenizer_that_joins_sentences_is_refused() -> None:
    class Joining:
        def encode(self, text: str, **options: bool) -> list[int]:
            return [len(text)]

        def decode(self, token_ids: list[int]) -> str:
            return ""

    with pytest.raises(ValueError, match="joins a full stop"):
        PromptBuilder(Joining())


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (" 51234. Remember it.", True),
        (" a51234", True),
        (" 512345", True),  # an answer is read as far as a key is long
        ("51234", True),
        (" number 7, that is 51234", True),
        (" 99999 51234", False),  # the first five count
        (" 5 1 2 3 4", False),
        (" 5123", False),
        ("", False),
        (" ٥١٢٣٤", False),
    ],
)
def test_the_first_five_digits_in_a_row_count(answer: str, found: bool) -> None:
    assert is_found(answer, "51234") is found
