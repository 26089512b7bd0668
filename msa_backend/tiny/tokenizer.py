"""The tokenizer of a tiny checkpoint: every byte, every word of `words`, and MiniMax-M3's markers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msa_backend.markers import NAMESPACE, ROLE, THINK_END, THINK_START
from msa_backend.tiny.chat_template import CHAT_TEMPLATE
from msa_backend.tiny.words import WORDS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, BOS, EOS = "]!p~[", "]~!b[", "[e~["
IMAGE, VIDEO = "]<]image[>[", "]<]video[>["

# Markers that frame text: skipped when an answer is decoded for a reader.
SPECIAL_TOKENS = (PAD, BOS, EOS, ROLE, IMAGE, VIDEO, "]<]start of image[>[", "]<]end of image[>[")
# Markers a reasoning or tool parser has to find in the decoded answer.
TEXT_MARKERS = (THINK_START, THINK_END, NAMESPACE)

NUM_BYTES = 256


def word_token_ids(words: Sequence[str] = WORDS) -> range:
    """The ids of the word tokens, each a word with its leading space; byte tokens come before them."""
    return range(NUM_BYTES, NUM_BYTES + len(words))


def token_id(marker: str, words: Sequence[str] = WORDS) -> int:
    """The id of one of the markers; they follow the words, as they follow the text vocabulary in MiniMax-M3."""
    return word_token_ids(words).stop + (SPECIAL_TOKENS + TEXT_MARKERS).index(marker)


def vocab_size(words: Sequence[str] = WORDS) -> int:
    """Rows of the embedding: all tokens, rounded up so that every tensor-parallel size divides them."""
    tokens = word_token_ids(words).stop + len(SPECIAL_TOKENS) + len(TEXT_MARKERS)
    return -(-tokens // 64) * 64


def byte_alphabet() -> list[str]:
    """The printable character that stands for a byte in the vocabulary file, in the order of the token ids."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def build_tokenizer(words: Sequence[str] = WORDS) -> Tokenizer:
    """The tokenizer of a vocabulary with these words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # A byte-pair model without merges knows whole words and single bytes, nothing between: an answer reads as
    # words, and yet every text has a spelling.
    vocab = {token: number for number, token in enumerate(byte_alphabet())}
    vocab |= {"Ġ" + word: number for number, word in zip(word_token_ids(words), words, strict=True)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in TEXT_MARKERS])
    return tokenizer


def save_tokenizer(directory: Path, words: Sequence[str] = WORDS, longest: int = 131072) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, complete for ``AutoTokenizer`` without a network.

    Args:
        longest: tokens of the longest prompt that the model was made for.
    """
    build_tokenizer(words).save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
