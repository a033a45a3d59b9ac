"""All token sequences that decode to a text.

A completion is graded by its text, and a text is the decoding of more than one token sequence: "12" of the tokens "12",
and of "1" and "2". The chance that a sampled completion is a certain text is a sum over all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

from tokenizers import decoders


class Tokenizations:
    """Token sequences by text, for tokenizers whose decoding puts the bytes of the tokens one after another.

    >>> from gdro_llm.problems.cells import character_tokenizer
    >>> tokenizer = character_tokenizer()
    >>> tokenizations = Tokenizations(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    >>> tokenizations.of("12", longest=14), tokenizations.count("12", longest=1)
    ([[1, 2]], 0)
    """

    def __init__(self, tokenizer: Any, size: int, stop_ids: Collection[int]) -> None:
        """For a model that draws ids in [0, `size`), of which `stop_ids` end a completion.

        Raises:
            ValueError: the decoding is of another kind, or an id has no text, so that it may occur anywhere in a
                sequence and change nothing.
        """
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        if not isinstance(decoder, decoders.ByteLevel | decoders.Fuse):
            raise ValueError(f"the tokenizer decodes by {type(decoder).__name__}, not by the bytes of each token")
        encoded = _byte_of_character() if isinstance(decoder, decoders.ByteLevel) else {}
        stops = set(stop_ids)
        self._ids: dict[bytes, list[int]] = defaultdict(list)
        for i, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(size)))):
            if i in stops:
                continue
            if not token:
                raise ValueError(f"token {i} of the model has no text in its tokenizer")
            inside = all(character in encoded for character in token)
            self._ids[bytes(map(encoded.__getitem__, token)) if inside else token.encode()].append(i)
        self._longest = max(map(len, self._ids))

    def count(self, text: str, longest: int) -> int:
        """How many sequences of at most `longest` tokens there are."""
        content = _content(text)
        ways = [[0] * (longest + 1) for _ in range(len(content) + 1)]  # by position and tokens left
        ways[-1] = [1] * (longest + 1)
        for start in reversed(range(len(content))):
            for end in range(start + 1, min(start + self._longest, len(content)) + 1):
                if same := len(self._ids.get(content[start:end], ())):
                    for left in range(1, longest + 1):
                        ways[start][left] += same * ways[end][left - 1]
        return ways[0][longest]

    def of(self, text: str, longest: int) -> list[list[int]]:
        """All sequences of at most `longest` tokens; look at their `count` first."""
        content, complete = _content(text), list[list[int]]()
        open_ends: list[tuple[int, list[int]]] = [(0, [])]
        while open_ends:
            start, ids = open_ends.pop()
            if start == len(content):
                complete.append(ids)
            elif len(ids) < longest:
                for end in range(start + 1, min(start + self._longest, len(content)) + 1):
                    open_ends += [(end, [*ids, i]) for i in self._ids.get(content[start:end], ())]
        return complete


def _content(text: str) -> bytes:
    if "\ufffd" in text:
        raise ValueError(f"{text[:80]!r} holds U+FFFD, which stands for any bytes that are no text")
    return text.encode()


def _byte_of_character() -> dict[str, int]:
    """The byte of each character of a byte-level token: itself where it can be seen, else U+0100 and up."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(others)}
