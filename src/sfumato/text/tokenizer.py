"""CLIP's byte-pair tokenizer, from the files a checkpoint carries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from sfumato.checkpoints.locate import locate_folder
from sfumato.errors import CheckpointError
from sfumato.files import output_folder, read_json, replacing

if TYPE_CHECKING:
    from os import PathLike

    from tokenizers import Tokenizer

__all__ = ["CLIPTokenizer", "TokenBatch", "prompt_length", "select_tokenizer_files"]

START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's words: contractions, runs of letters, single digits, runs of anything else that is not space.
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class TokenBatch:
    """Token ids (B, S), a mask (B, S) with 1 where they are not padding, and per prompt the text that did not fit."""

    input_ids: Tensor
    attention_mask: Tensor
    lost: tuple[str, ...]


class CLIPTokenizer:
    """Turns prompts into ids between a start and an end token, padded or cut to the model's length."""

    def __init__(
        self, tokenizer: Tokenizer, *, pad_token: str = END, model_max_length: int = 77, files: dict[str, bytes]
    ) -> None:
        self._tokenizer = tokenizer
        self._files = files
        self.model_max_length = model_max_length
        self.bos_token_id = _id(tokenizer, START)
        self.eos_token_id = _id(tokenizer, END)
        self.pad_token_id = _id(tokenizer, pad_token)

    @classmethod
    def from_pretrained(cls, name: str | PathLike[str], *, subfolder: str | None = None, **hub: Any) -> Self:
        """From a folder, the hub's cache or the hub; `subfolder` is a folder inside it. Raises `CheckpointError`."""

        def select(names: Sequence[str], strict: bool) -> list[str]:
            return select_tokenizer_files(names, subfolder or "")

        root = locate_folder(name, select, **hub)
        return cls.from_folder(root / subfolder if subfolder else root)

    @classmethod
    def from_folder(cls, folder: Path, *, pad_token_id: int | None = None) -> Self:
        """From `vocab.json` and `merges.txt`, or else `tokenizer.json`. Raises `CheckpointError` naming the file.

        pad_token_id: what to pad with where no file beside them says so, as in the folders of Apple's Swift apps.
        """
        files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        if {"vocab.json", "merges.txt"} <= files.keys():
            tokenizer = _from_bpe(folder)
        elif "tokenizer.json" in files:
            tokenizer = _from_json(folder / "tokenizer.json")
        else:
            raise CheckpointError(
                f"{folder} has neither vocab.json with merges.txt nor tokenizer.json; the copy is incomplete"
            )
        config = read_json(folder / "tokenizer_config.json") if "tokenizer_config.json" in files else {}
        names = read_json(folder / "special_tokens_map.json") if "special_tokens_map.json" in files else {}
        # Files without a list of added tokens leave the last word to the older map: Stable Diffusion 2.1 pads with "!".
        named = config if "added_tokens_decoder" in config else config | {k: v for k, v in names.items() if v}
        if pad_token_id is not None and not config and not names:
            named = {"pad_token": _token_of(tokenizer, pad_token_id)}
        _add_special(tokenizer, list(config.get("added_tokens_decoder", {}).values()), named)
        pad = _token(named.get("pad_token") or END)
        return cls(tokenizer, pad_token=pad, model_max_length=prompt_length(config), files=files)

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the files this tokenizer was made from."""
        path = output_folder(folder)
        for name, content in self._files.items():
            with replacing(path / name) as temporary:
                temporary.write_bytes(content)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text, without start and end."""
        return self._tokenizer.encode(text, add_special_tokens=False).tokens

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: str | bool = "max_length",
        max_length: int | None = None,
        truncation: bool = True,
        return_tensors: str = "pt",
        **_: Any,
    ) -> TokenBatch:
        """Encode one text or several, of equal length after padding to `max_length` (`"max_length"`) or the longest
        (True).

        A text longer than `max_length` (the model's if None) is cut unless `truncation=False`; `lost` says what fell
        off.
        """
        texts = [text] if isinstance(text, str) else list(text)
        limit = max_length or self.model_max_length
        rows, lost = zip(*(self._encode(one, limit if truncation else None) for one in texts), strict=True)
        width = limit if padding == "max_length" else max(map(len, rows))
        ids = torch.full((len(rows), max(width, *map(len, rows))), self.pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return TokenBatch(ids, mask, lost)

    def _encode(self, text: str, limit: int | None) -> tuple[list[int], str]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        room = None if limit is None else max(limit - 2, 0)
        ids = encoding.ids if room is None else encoding.ids[:room]
        lost = "" if room is None or len(encoding.ids) <= room else text[encoding.offsets[room][0] :].strip()
        return [self.bos_token_id, *ids, self.eos_token_id], lost


def prompt_length(config: Mapping[str, Any]) -> int:
    """Tokens a prompt may have, start and end included, by a `tokenizer_config.json`."""
    length = config.get("model_max_length") or 77
    # Some files say 1e30 for "unlimited"; CLIP has 77 positions.
    return int(length) if length < 1e6 else 77


def select_tokenizer_files(names: Sequence[str], folder: str) -> list[str]:
    """The files of a repository that its tokenizer needs. Raises `CheckpointError` where they are not all there."""
    prefix = f"{folder}/" if folder else ""
    found = [prefix + name for name in FILES if prefix + name in names]
    if not ({prefix + "vocab.json", prefix + "merges.txt"} <= set(found) or prefix + "tokenizer.json" in found):
        raise CheckpointError(f"{folder or 'the repository'} has neither vocab.json with merges.txt nor tokenizer.json")
    return found


def _from_bpe(folder: Path) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab = read_json(folder / "vocab.json")
    try:
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [(a, b) for line in lines if line and not line.startswith("#version") for a, b in [line.split(" ")]]
        model = models.BPE(
            vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=END
        )
    except Exception as error:  # the library raises plain Exceptions
        raise CheckpointError(
            f"{folder / 'merges.txt'} does not fit vocab.json ({error}); copy or download both again"
        ) from error
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return tokenizer


def _from_json(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exceptions
        raise CheckpointError(f"{path} is not a tokenizer file ({error}); copy or download it again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise CheckpointError(f"the tokenizer has no token {token!r}; its files are not those of a CLIP tokenizer")
    return found


def _token_of(tokenizer: Tokenizer, id_: int) -> str:
    found = tokenizer.id_to_token(id_)
    if found is None:
        raise CheckpointError(f"the tokenizer has no token {id_} to pad with; its files are of another checkpoint")
    return found


def _add_special(tokenizer: Tokenizer, listed: list[Any], named: dict[str, Any]) -> None:
    """Special tokens are found anywhere in a text before its words are, also where one of them is a plain "!".

    Of two that differ only in their flags, the later one holds, in the ecosystem's order.
    """
    from tokenizers import AddedToken

    for token in (START, END):
        _id(tokenizer, token)  # adding one that is missing would only hide it
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()} | {*map(_token, listed)}
    tokens = list(listed)
    for key, default in (("bos_token", START), ("eos_token", END), ("unk_token", END), ("pad_token", END)):
        value = named.get(key) or default
        if _token(value) not in known and value not in tokens:
            tokens.append(value)
    for token in tokens:
        fields = token if isinstance(token, dict) else {}
        flags = {key: bool(fields.get(key)) for key in ("lstrip", "rstrip", "single_word", "normalized")}
        tokenizer.add_special_tokens([AddedToken(_token(token), special=True, **flags)])


def _token(value: Any) -> str:
    return str(value["content"]) if isinstance(value, dict) else json.loads(json.dumps(value))
