"""CLIP's tokenizer: the tokens of open_clip's, with a bounded cache of words.

open_clip's tokenizer repairs the encoding of every text, which is half of its time, and caches every word for ever. For
eleven captions an image and hundreds of images a second the GPU would wait for it, and the words of a crawl would
fill the memory.

The legend of the names: T texts, L tokens of the context.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from threading import Lock

import numpy as np
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, get_clean_fn
from torch import Tensor

# Words in the cache, some 15 MB: most of a natural vocabulary, names and misspellings included.
_WORDS_KEPT = 1 << 16


class ClipTokenizer:
    """Tokenize as an open_clip tokenizer does, and say which texts it cut. Thread-safe."""

    def __init__(self, tokenizer: SimpleTokenizer | HFTokenizer) -> None:
        self._tokenizer = tokenizer
        self._context_length = tokenizer.context_length
        # Other classes, and CLIPA's other ways to shorten a text, go through open_clip's own code.
        self._is_plain = type(tokenizer) is SimpleTokenizer and tokenizer.reduction_fn is None
        self._lowers = tokenizer.clean_fn is get_clean_fn("lower")
        self._new_word = Lock()
        self._word_ids = lru_cache(_WORDS_KEPT)(self._encode_word)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, list[bool]]:
        """Return the tokens, int64 of shape (T, L), and which texts were cut to the context."""
        if self._is_plain:
            return self._pad([self._encode(text) for text in texts])
        return self._tokenizer(list(texts)), [
            length > self._context_length for length in self._lengths(texts)
        ]

    def _encode(self, text: str) -> list[int]:
        """Return a text's tokens, start and end included."""
        if self._lowers and text.isascii() and text.isprintable() and "&" not in text:
            # Printable ASCII without entities: ftfy and html.unescape would change nothing.
            text = " ".join(text.split()).lower()
        else:
            text = self._tokenizer.clean_fn(text)
        words = map(self._word_ids, self._tokenizer.pat.findall(text))
        return [self._tokenizer.sot_token_id, *chain.from_iterable(words), self._tokenizer.eot_token_id]

    def _encode_word(self, word: str) -> tuple[int, ...]:
        tokenizer = self._tokenizer
        symbols = "".join(tokenizer.byte_encoder[byte] for byte in word.encode())
        with self._new_word:  # the tokenizer's own cache is not safe for removal by another thread
            is_new = symbols not in tokenizer.cache
            pieces = tokenizer.bpe(symbols)
            if is_new:
                tokenizer.cache.pop(symbols, None)  # that cache is unbounded
        return tuple(tokenizer.encoder[piece] for piece in pieces.split(" "))

    def _pad(self, encoded: list[list[int]]) -> tuple[Tensor, list[bool]]:
        """Cut each text to the context, its end kept, and fill up with zeros."""
        truncated = [len(ids) > self._context_length for ids in encoded]
        for row, is_truncated in enumerate(truncated):
            if is_truncated:
                encoded[row] = [*encoded[row][: self._context_length - 1], self._tokenizer.eot_token_id]
        lengths_T1 = np.array([[len(ids)] for ids in encoded])
        tokens_TL = np.zeros((len(encoded), self._context_length), np.int64)
        tokens_TL[np.arange(self._context_length) < lengths_T1] = list(chain.from_iterable(encoded))
        return torch.from_numpy(tokens_TL), truncated

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each text has, start and end included, before it is cut."""
        if isinstance(self._tokenizer, SimpleTokenizer):
            return [len(self._tokenizer.encode(text)) + 2 for text in texts]
        cleaned = [self._tokenizer.clean_fn(text) for text in texts]
        return [len(ids) for ids in self._tokenizer.tokenizer(cleaned, verbose=False).input_ids]
