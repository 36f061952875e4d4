"""The tokenizer's ecosystem interface: ids as lists or tensors, and decoding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch

from sfumato.ecosystem import answer
from sfumato.errors import UnknownArgument, UsageError, suggest
from sfumato.outputs import Output
from sfumato.text.embeddings import pieces
from sfumato.values import Within, check_argument, shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

__all__ = ["Calling", "TokenBatch"]

KINDS = (None, "pt", "np")


def _whole(ids: Any) -> list[int]:
    """Flatten ids to a list. Raises `UsageError` unless they are whole numbers."""
    rows = ids.flatten().tolist() if isinstance(ids, torch.Tensor) else np.ravel(ids).tolist()
    if not all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 2**32 for one in rows):
        raise UsageError(f"ids must be whole numbers, in a list or a tensor, not {shown(ids)}")
    return rows


@dataclass(frozen=True, eq=False)
class TokenBatch(Output):
    """Token ids (B, S), an attention mask (B, S) with 0 for padding, and for each prompt the text that was truncated.

    Ids and mask are tensors, arrays or lists, as requested.
    """

    input_ids: Any
    attention_mask: Any = None
    lost: tuple[str, ...] = field(default=(), compare=False)

    def to(self, device: str | torch.device) -> TokenBatch:
        """Return a copy with the tensors on a device."""
        return TokenBatch(**{name: value.to(device) for name, value in self.items()}, lost=self.lost)


class Calling:
    """The interface of a transformers tokenizer."""

    _tokenizer: Tokenizer
    model_max_length: int
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: str | bool = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool = True,
        add_special_tokens: bool = True,
        words: Mapping[str, Sequence[int]] | None = None,
        **unknown: Any,
    ) -> TokenBatch:
        """Encode one or several texts. Defaults are those of transformers: no padding, no truncation, lists of ids.

        padding: "max_length" pads to `max_length` (default: the model's), True or "longest" to the longest text.
        return_tensors: "pt", "np", or None for lists. words: ids of textual inversion tokens by name
        (text/embeddings.py). The `lost` field of the result contains truncated text. Raises `UsageError` for anything
        but text, and for tensors with rows of unequal length.
        """
        for name, value in unknown.items():
            if value not in (None, False):
                near = suggest(name, ("padding", "truncation", "max_length", "return_tensors"))
                raise UnknownArgument(f"the tokenizer has no argument {name!r}{near}")
        if not (return_tensors is None or isinstance(return_tensors, str)) or return_tensors not in KINDS:
            raise UsageError(f"return_tensors must be 'pt', 'np' or None, not {shown(return_tensors)}")
        texts: list[Any] = list(text) if isinstance(text, (list, tuple)) else [text]
        if not texts or not all(isinstance(one, str) for one in texts):
            raise UsageError(f"the tokenizer takes a text or a list of texts, not {shown(text)}")
        for name, value, kind in (
            ("max_length", max_length, Annotated[int | None, Within(1, 10**6)]),
            ("padding", padding, str | bool),
            ("truncation", truncation, str | bool | None),
            ("add_special_tokens", add_special_tokens, bool),
            ("return_attention_mask", return_attention_mask, bool | None),
        ):
            check_argument(name, value, kind)
        limit = max_length or self.model_max_length
        cut = truncation not in (None, False, "do_not_truncate")
        rows, lost = zip(
            *(self._ids(one, limit if cut else None, add_special_tokens, words or {}) for one in texts), strict=True
        )
        width = {"max_length": limit, "longest": 10**9, True: 10**9}.get(padding, 0)
        width = min(width, max(map(len, rows))) if width == 10**9 else width
        ids = [row + [self.pad_token_id] * (width - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        kept = [ids, mask] if return_attention_mask else [ids]
        if return_tensors is None:
            kept = [rows[0] for rows in kept] if isinstance(text, str) else kept
        elif len(set(map(len, ids))) > 1:
            raise UsageError(
                "texts of different lengths do not fit into one tensor; pass padding=True or padding='max_length'"
            )
        else:
            kept = [torch.tensor(rows) if return_tensors == "pt" else torch.tensor(rows).numpy() for rows in kept]
        return TokenBatch(*kept, lost=lost)

    def _ids(
        self, text: str, limit: int | None, special: bool = True, words: Mapping[str, Sequence[int]] | None = None
    ) -> tuple[list[int], str]:
        """Return at most `limit` ids of a text, including start and end tokens if `special`, and the truncated text."""
        ids: list[int] = []
        begins: list[int] = []  # start position of each token in the text
        for begin, piece, own in pieces(text, words or {}):
            if own:
                ids += own
                begins += [begin] * len(own)
                continue
            try:
                encoding = self._tokenizer.encode(piece, add_special_tokens=False)
            except (TypeError, UnicodeError) as error:
                raise UsageError("the prompt contains bytes that are not valid UTF-8; type it again") from error
            ids += encoding.ids
            begins += [begin + start for start, _ in encoding.offsets]
        room = len(ids) if limit is None else max(limit - 2 * special, 0)
        # Truncate a textual inversion as a whole: part of its vectors would be meaningless.
        if len(ids) > room and words and ids[room] >= min(map(min, words.values())):
            room = begins.index(begins[room])
        lost = "" if len(ids) <= room else text[begins[room] :].strip()
        return [self.bos_token_id, *ids[:room], self.eos_token_id] if special else ids[:room], lost

    def ids(self, text: str, words: Mapping[str, Sequence[int]] | None = None) -> list[int]:
        """Return all ids of a text, without start and end tokens. Raises `UsageError` for anything but text."""
        return self._ids(text, None, special=False, words=words)[0]

    def fitted(
        self, texts: Sequence[str], length: int | None = None, words: Mapping[str, Sequence[int]] | None = None
    ) -> TokenBatch:
        """Encode texts for a text encoder: tensors padded and truncated to `length` (default: the model's)."""
        return self(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt", words=words)

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of a text, without start and end."""
        check_argument("text", text, str)
        return self._tokenizer.encode(text, add_special_tokens=False).tokens

    def encode(self, text: str, **options: Any) -> list[int] | Tensor:
        """Return the ids of one text, including start and end tokens; the options are those of a call."""
        return self(text, **options).input_ids

    def decode(self, token_ids: int | Sequence[int] | Tensor, skip_special_tokens: bool = False, **_: Any) -> str:
        """Return the text of ids, in lower case; includes special tokens unless they are skipped."""
        ids = _whole(token_ids)
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens).replace("</w>", " ").strip()

    def batch_decode(self, sequences: Iterable[Any], skip_special_tokens: bool = False, **_: Any) -> list[str]:
        """Apply `decode` to each row of ids."""
        if not isinstance(sequences, Iterable) or (isinstance(sequences, torch.Tensor) and not sequences.ndim):
            raise UsageError(f"batch_decode takes rows of ids, not {shown(sequences)}")
        return [self.decode(row, skip_special_tokens) for row in sequences]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Return the id of a token, or a list of ids; unknown tokens have the id of the end token."""
        if isinstance(tokens, str):
            found = self._tokenizer.token_to_id(tokens)
            return self.eos_token_id if found is None else found
        check_argument("tokens", tokens, tuple[str, ...])
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Iterable[int]) -> Any:
        """Return the token of an id, or a list of tokens."""
        tokens = [self._tokenizer.id_to_token(one) for one in _whole(ids)]
        return tokens[0] if isinstance(ids, int) else tokens

    def get_vocab(self) -> dict[str, int]:
        """Return all tokens and their ids."""
        return self._tokenizer.get_vocab()

    @property
    def vocab_size(self) -> int:
        """The number of tokens in the vocabulary."""
        return self._tokenizer.get_vocab_size(with_added_tokens=False)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens by purpose."""
        purposes = {"bos_token": self.bos_token_id, "eos_token": self.eos_token_id, "unk_token": self.eos_token_id}
        purposes["pad_token"] = self.pad_token_id
        return {purpose: self.convert_ids_to_tokens(id_) for purpose, id_ in purposes.items()}

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of the special tokens."""
        return list(dict.fromkeys((self.bos_token_id, self.eos_token_id, self.pad_token_id)))

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def __getattr__(self, name: str) -> Any:
        if name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            return self.special_tokens_map[name]
        raise answer("part", name, type(self).__name__)
