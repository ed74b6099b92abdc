"""A tokenizer for models that were never trained: one token for every byte, and some to spare."""

from itertools import product
from pathlib import Path
from string import ascii_lowercase

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def save_byte_tokenizer(folder: Path, vocabulary: int) -> None:
    """Every token of the vocabulary has a text; text is never encoded to those beyond 255."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = ("".join(pair) for pair in product(ascii_lowercase, repeat=2))
    names += [next(pairs) for _ in range(vocabulary - len(names))]
    tokenizer = Tokenizer(models.BPE({name: token for token, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
