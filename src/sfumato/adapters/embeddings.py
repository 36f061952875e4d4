"""Embedding files (textual inversion) in every common layout, including those bundled with adapters."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from sfumato.errors import CheckpointError, UsageError
from sfumato.text.embeddings import Embedding

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sfumato.adapters.files import Stored

__all__ = ["bundled", "check_fits", "read_embeddings"]

# Keys that programs use for the tensor instead of the word.
ANONYMOUS = ("emb_params", "tensor", "string_to_param.*", "*", "clip_l", "clip_g", "embedding")
# File stems that are not words.
STEMS = ("learned_embeds", "pytorch_model", "model")
# A prompt has room for at most this many.
MOST_VECTORS = 75
BUNDLE = "bundle_emb."


def read_embeddings(stored: Stored, name: str | None = None) -> list[Embedding]:
    """Return the embeddings in a file: a single one, or several named by their keys.

    name: the name of a single embedding (default: its key, if that is a word, and the file's stem). Raises
    `CheckpointError` if the file contains no embedding, and `UsageError` if one has no name.
    """
    words: dict[str, dict[int, Tensor]] = {}
    for key, tensor in stored.tensors.items():
        if not tensor.is_floating_point() or key.startswith("string_to_token"):
            continue
        vectors = _vectors(tensor, key, stored.where)
        plain = re.sub(r"^\d+\.", "", key)  # in a list of dictionaries
        word = "" if plain in ANONYMOUS or plain.startswith("string_to_param") or plain != key else key
        words.setdefault(word, {})[vectors.shape[1]] = vectors
    if not words:
        raise CheckpointError(f"{stored.where} contains no embedding; give a textual-inversion file")
    if name is not None and len(words) > 1:
        raise UsageError(f"{stored.where} has {len(words)} embeddings ({', '.join(words)}), so omit the name")
    stem = "" if stored.path is None or stored.path.stem in STEMS or len(words) > 1 else stored.path.stem
    every = []
    for word, vectors in words.items():
        names = (name,) if name is not None else tuple(dict.fromkeys(one for one in (word, stem) if one))
        if not names or not all(one.strip() for one in names):
            raise UsageError(f"{stored.where} does not name its embedding; pass a name (token=…)")
        every.append(Embedding(names, vectors))
    return every


def bundled(stored: Stored) -> tuple[list[Embedding], set[str]]:
    """Return the embeddings bundled in an adapter's file, and their keys ("bundle_emb.name.…" or "<s1>")."""
    words: dict[str, dict[int, Tensor]] = {}
    used = set()
    for key, tensor in stored.tensors.items():
        if key.startswith(BUNDLE):
            word = re.sub(r"\.(string_to_param\.\*|clip_l|clip_g|emb_params)$", "", key.removeprefix(BUNDLE))
        elif re.fullmatch(r"<[^<>]+>", key) and tensor.ndim <= 2:
            word = key
        else:
            continue
        used.add(key)
        if tensor.is_floating_point():
            vectors = _vectors(tensor, key, stored.where)
            words.setdefault(word, {})[vectors.shape[1]] = vectors
    return [Embedding((word,), vectors) for word, vectors in words.items()], used


def check_fits(embeddings: Sequence[Embedding], widths: Sequence[int], where: str) -> None:
    """Raise `CheckpointError` unless each embedding has vectors for all text encoders. widths: of their vectors."""
    for embedding in embeddings:
        missing = [width for width in widths if width not in embedding.vectors]
        if missing:
            own = " and ".join(str(width) for width in embedding.vectors)
            raise CheckpointError(
                f"{where}: the embedding {embedding.names[0]!r} has {own} values per vector, but the text "
                f"encoder{'s' * (len(widths) > 1)} here need{'s' * (len(widths) == 1)} "
                f"{' and '.join(map(str, widths))}; use it with a checkpoint of the family it was made for"
            )


def _vectors(tensor: Tensor, key: str, where: str) -> Tensor:
    vectors = tensor.detach().float()
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or not 1 <= vectors.shape[0] <= MOST_VECTORS or not vectors.shape[1]:
        raise CheckpointError(
            f"{where}: {key!r} has the shape {tuple(tensor.shape)}, but an embedding has 1 to {MOST_VECTORS} vectors; "
            "give a textual-inversion file"
        )
    if not bool(torch.isfinite(vectors).all()):
        raise CheckpointError(f"{where}: {key!r} has NaN or infinite values; download or copy it again")
    return vectors
