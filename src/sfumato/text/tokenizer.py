"""CLIP's byte-pair tokenizer, read from a checkpoint's files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from sfumato.checkpoints.locate import locate_folder
from sfumato.errors import CheckpointError
from sfumato.files import MOST_JSON, parse_json, read_bytes, read_json, replacing
from sfumato.folders import saving_into
from sfumato.text.calling import Calling, TokenBatch
from sfumato.values import Within, check_argument, check_value, reason, shown

if TYPE_CHECKING:
    from os import PathLike

    from tokenizers import Tokenizer

__all__ = ["CLIPTokenizer", "TokenBatch", "prompt_length", "prompt_tokens", "select_tokenizer_files"]

START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's words: contractions, runs of letters, single digits, runs of any other non-space characters.
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# The 256 characters that byte-level encodings use for bytes, and runs of letters or symbols among them.
BYTES = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
RUN = re.compile(r"[a-z\u0080-\uffff]+|[^a-zA-Z0-9\s]+")
# More tokens than any text encoder's embedding table has.
MOST_TOKENS = 2**19
FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class CLIPTokenizer(Calling):
    """Turns prompts into ids between start and end tokens, padded or truncated to the model's length."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        largest_id: int,
        pad_token: str = END,
        model_max_length: int = 77,
        files: dict[str, bytes],
    ) -> None:
        self._tokenizer = tokenizer
        self._files = files
        self.largest_id = largest_id
        self.model_max_length = model_max_length
        self.bos_token_id = _id(tokenizer, START)
        self.eos_token_id = _id(tokenizer, END)
        self.pad_token_id = _id(tokenizer, pad_token)

    @classmethod
    def from_pretrained(cls, name: str | PathLike[str], *, subfolder: str | None = None, **hub: Any) -> Self:
        """Load from a folder, the hub cache or the hub; `subfolder` is a folder inside it. Raises `CheckpointError`."""
        check_argument("subfolder", subfolder, str | None)

        def select(names: Sequence[str], strict: bool) -> list[str]:
            return select_tokenizer_files(names, subfolder or "")

        root = locate_folder(name, select, **hub)
        return cls.from_folder(root / subfolder if subfolder else root)

    @classmethod
    def from_folder(cls, folder: Path, *, pad_token_id: int | None = None) -> Self:
        """Load `vocab.json` and `merges.txt`, or else `tokenizer.json`. Raises `CheckpointError` naming the file.

        Of `tokenizer.json`, only vocabulary, merges and special tokens are used: other settings could be crafted to
        take unlimited time and memory. pad_token_id: the padding token if no file specifies one, as in folders of
        Apple's Swift apps.
        """
        files = {name: read_bytes(folder / name, MOST_JSON) for name in FILES if os.path.lexists(folder / name)}
        told = {name: parse_json(files[name], folder / name) for name in files if name.endswith(".json")}
        config, names = (told.get(name, {}) for name in ("tokenizer_config.json", "special_tokens_map.json"))
        listed, named, pad = _special_tokens(folder, config, names)
        if {"vocab.json", "merges.txt"} <= files.keys():
            where, vocab, merges = folder / "merges.txt", told["vocab.json"], _merges(files["merges.txt"])
        elif "tokenizer.json" in files:
            where = folder / "tokenizer.json"
            vocab, merges, added = _from_json(told["tokenizer.json"], where)
            listed = [*added, *listed]
        else:
            raise CheckpointError(
                f"{folder} has neither vocab.json with merges.txt nor tokenizer.json; the copy is incomplete"
            )
        _check_vocabulary(vocab, where)
        tokenizer = _byte_pairs(vocab, merges, where)
        if pad_token_id is not None and not config and not names:
            pad = _token_of(tokenizer, pad_token_id)
            named.append({"content": pad})
        _add_special(tokenizer, listed, named)
        _check_merges(vocab, merges, where, {*tokenizer.get_added_tokens_decoder()})
        largest = max(*vocab.values(), *tokenizer.get_added_tokens_decoder())
        length = _prompt_length(config, folder / "tokenizer_config.json")
        return cls(tokenizer, largest_id=largest, pad_token=pad, model_max_length=length, files=files)

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the files this tokenizer was loaded from, all or none. Raises `OutputError`."""
        last = next(name for name in ("vocab.json", "tokenizer.json") if name in self._files)
        with saving_into(folder, last=last, stale=FILES.__contains__) as new:
            for name, content in self._files.items():
                with replacing(new / name) as temporary:
                    temporary.write_bytes(content)


def prompt_length(folder: Path) -> int:
    """Return a tokenizer's maximum prompt length, including start and end tokens. Raises `ConfigError`."""
    path = folder / "tokenizer_config.json"
    return _prompt_length(read_json(path) if os.path.lexists(path) else {}, path)


def _prompt_length(config: Mapping[str, Any], where: Path) -> int:
    length = config.get("model_max_length")
    if length is not None:
        check_value(str(where), "model_max_length", length, Annotated[float, Within(2, 1e31)])
    # Some files use 1e30 for "unlimited"; CLIP has 77 positions.
    return int(length) if length is not None and length < 1e6 else 77


def prompt_tokens(folder: Path) -> int:
    """Return the maximum prompt length of the tokenizers in a checkpoint folder."""
    folders = [folder / name for name in ("tokenizer", "tokenizer_2") if os.path.isdir(folder / name)]
    return min(map(prompt_length, folders or [folder / "tokenizer"]))


def select_tokenizer_files(names: Sequence[str], folder: str) -> list[str]:
    """Return the files a tokenizer needs from a repository. Raises `CheckpointError` if any is missing."""
    prefix = f"{folder}/" if folder else ""
    found = [prefix + name for name in FILES if prefix + name in names]
    if not ({prefix + "vocab.json", prefix + "merges.txt"} <= set(found) or prefix + "tokenizer.json" in found):
        raise CheckpointError(f"{folder or 'the repository'} has neither vocab.json with merges.txt nor tokenizer.json")
    return found


def _merges(text: bytes) -> list[Any]:
    lines = text.decode("utf-8", errors="replace").splitlines()
    return [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]


def _from_json(told: dict[str, Any], where: Path) -> tuple[dict[str, Any], list[Any], list[dict[str, Any]]]:
    """Return the vocabulary, merges and special tokens of a `tokenizer.json`."""
    model, added = told.get("model"), told.get("added_tokens") or []
    model = model if isinstance(model, dict) and model.get("type", "BPE") == "BPE" else {}
    if not (isinstance(model.get("merges"), list) and isinstance(model.get("vocab"), dict)):
        raise CheckpointError(f"{where} is not a byte-pair tokenizer like CLIP's; copy or download it again")
    check_value(str(where), "added_tokens", added, tuple[dict[str, Any], ...])
    merges = [tuple(one.split(" ")) if isinstance(one, str) else one for one in model["merges"]]
    return model["vocab"], merges, [_special(where, "added_tokens", one) for one in added]


def _check_vocabulary(vocab: dict[str, Any], where: Path) -> None:
    """Raise `CheckpointError` unless each token has a unique id below `MOST_TOKENS`."""
    ids = vocab.values()
    if not all(type(one) is int and 0 <= one < MOST_TOKENS for one in ids) or len(set(ids)) < max(len(ids), 1):
        raise CheckpointError(
            f"{where.parent}: the vocabulary does not give each token a unique id below {MOST_TOKENS}; copy "
            "or download the tokenizer again"
        )


def _check_merges(vocab: dict[str, int], merges: list[Any], where: Path, special: set[int]) -> None:
    """Raise `CheckpointError` if merges are missing: words would be split into letters, and images would differ.

    In a byte-pair vocabulary, every run of several letters or symbols is the result of a merge.
    """
    lost = vocab.keys() - {"".join(pair) for pair in merges}
    if len(lost) < len(BYTES) or not all(letter in lost and f"{letter}</w>" in lost for letter in BYTES):
        return  # not a byte-level vocabulary, as in some tests; nothing to check
    lost = [token for token in lost if len(token.removesuffix("</w>")) > 1 and vocab[token] not in special]
    words = [token for token in lost if RUN.fullmatch(token.removesuffix("</w>"))]
    if words:
        raise CheckpointError(
            f"{where} does not fit the vocabulary: {len(words)} of its words, such as {shown(min(words))}, are the "
            "result of no merge, so it is incomplete; copy or download it again"
        )


def _byte_pairs(vocab: dict[str, int], merges: list[Any], where: Path) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    try:
        if not all(len(pair) == 2 and all(pair) for pair in merges):
            raise ValueError("a merge is of two tokens")
        model = models.BPE(
            vocab=vocab,
            merges=list(map(tuple, merges)),
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=END,
        )
    except Exception as error:  # the library raises plain Exceptions
        raise CheckpointError(
            f"{where} does not fit the vocabulary ({reason(error)}); copy or download the tokenizer again"
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
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise CheckpointError(f"the tokenizer has no token {token!r}; its files are not a CLIP tokenizer's")
    return found


def _token_of(tokenizer: Tokenizer, id_: int) -> str:
    found = tokenizer.id_to_token(id_)
    if found is None:
        raise CheckpointError(f"the tokenizer has no token {id_} to pad with; its files belong to another checkpoint")
    return found


def _special_tokens(
    folder: Path, config: dict[str, Any], names: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """Return a tokenizer's listed special tokens, those with a purpose, and the padding token."""
    where = folder / "tokenizer_config.json"
    listed = config.get("added_tokens_decoder", {})
    check_value(str(where), "added_tokens_decoder", listed, dict[str, Any])
    # Without a list of added tokens, the older map has precedence: Stable Diffusion 2.1 pads with "!".
    named = config if "added_tokens_decoder" in config else config | {key: one for key, one in names.items() if one}
    purposes = (("bos_token", START), ("eos_token", END), ("unk_token", END), ("pad_token", END))
    values = {key: named.get(key) or default for key, default in purposes}
    specials = {key: _special(where if named is config else folder, key, value) for key, value in values.items()}
    # If two are equal, the first keeps its position.
    first = [key for i, key in enumerate(values) if values[key] not in [*values.values()][:i]]
    listed = [_special(where, "added_tokens_decoder", one) for one in listed.values()]
    return listed, [specials[key] for key in first], specials["pad_token"]["content"]


def _special(where: Path, key: str, value: Any) -> dict[str, Any]:
    """Parse a special token with its flags. Raises `ConfigError` unless it is a string or a valid object."""
    check_value(str(where), key, value, str | dict[str, Any])
    told = {"content": value} if isinstance(value, str) else value
    check_value(str(where), f"content of {key}", told.get("content"), Annotated[str, Within(1, 1000)])
    flags = {name: told.get(name) or False for name in ("lstrip", "rstrip", "single_word", "normalized")}
    for name, flag in flags.items():
        check_value(str(where), f"{name} of {key}", flag, bool)
    return {"content": told["content"], **flags}


def _add_special(tokenizer: Tokenizer, listed: list[dict[str, Any]], named: list[dict[str, Any]]) -> None:
    """Add special tokens, which are matched before words, even if one of them is a plain "!".

    If two differ only in their flags, the later one wins, in the same order as in transformers.
    """
    from tokenizers import AddedToken

    for token in (START, END):
        _id(tokenizer, token)  # adding a missing one would hide the problem
    known = {token["content"] for token in listed}
    tokens = listed + [token for token in named if token["content"] not in known]
    try:
        tokenizer.add_special_tokens([AddedToken(special=True, **token) for token in tokens])
    except Exception as error:  # the library raises plain Exceptions
        raise CheckpointError(f"the special tokens of the tokenizer cannot be used ({reason(error)})") from error
