"""What `sfumato show` prints about an adapter or embedding, from the file's header alone."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from sfumato.adapters.adapter import PARTS, grouped
from sfumato.adapters.embeddings import ANONYMOUS, BUNDLE
from sfumato.adapters.families import made_for
from sfumato.adapters.files import Stored
from sfumato.adapters.kinds import kind_of, rank_of
from sfumato.checkpoints.builtin import builtin_name
from sfumato.checkpoints.headers import MOST_HEADER, read_header
from sfumato.files import expanded

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["about_adapter", "is_adapter"]

# Metadata keys of training programs that are useful to users, and the names they are shown under.
TRAINING = {
    "ss_sd_model_name": "trained on", "ss_network_module": "program", "ss_resolution": "resolution",
    "ss_clip_skip": "clip skip", "ss_num_train_images": "images", "ss_num_epochs": "epochs", "ss_steps": "steps",
    "ss_noise_offset": "noise offset", "ss_zero_terminal_snr": "zero terminal SNR", "ss_training_comment": "comment",
    "modelspec.title": "title", "modelspec.author": "author", "modelspec.license": "license",
    "modelspec.prediction_type": "predicts", "modelspec.usage_hint": "hint",
}  # fmt: skip


def is_adapter(name: str | PathLike[str]) -> bool:
    """Return whether a name is that of a safetensors file with an adapter or embedding."""
    path = expanded(name)
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    headers: Any = read_header(path, MOST_HEADER).tensors
    return bool(grouped(Stored(headers), _words(headers))[0]) or _is_embedding(headers)


def about_adapter(name: str | PathLike[str]) -> dict[str, Any]:
    """Describe an adapter (kinds, ranks, modules by part, family, trigger words, training) or an embedding (sizes).

    Raises `CheckpointError` if the file cannot be read.
    """
    header: Any = read_header(expanded(name), MOST_HEADER)
    stored = Stored(headers := header.tensors, metadata := header.metadata, header.path)
    numbers = sum(getattr(header, "count", 0) for header in headers.values())
    about: dict[str, Any] = {"name": builtin_name(header.path), "parameters": numbers, "family": made_for(stored)}
    if _is_embedding(headers):
        vectors = {key: header.shape[0] if len(header.shape) > 1 else 1 for key, header in headers.items()}
        widths = [(one.shape or (1,))[-1] for one in headers.values()]
        return about | {"is": "embedding", "vectors": vectors, "widths": widths}
    words = _words(headers)
    modules, unknown = grouped(stored, words)
    return about | {
        "is": "adapter",
        "kinds": dict(Counter(_kind(parts) for parts in modules.values())),
        "ranks": sorted({rank for parts in modules.values() if (rank := rank_of(parts)) is not None}),
        "modules": dict(Counter(_part(module) for module in modules)),
        "unknown": len(unknown),
        "embeddings": sorted({word.removeprefix(BUNDLE).split(".")[0] for word in words}),
        "trained_as": metadata.get("ss_output_name"),
        "trigger_words": _triggers(stored),
        "training": {
            said: metadata[key][:200] for key, said in TRAINING.items() if metadata.get(key, "None") != "None"
        },
    }


def _words(headers: Any) -> set[str]:
    return {key for key in headers if key.startswith(BUNDLE) or re.fullmatch(r"<[^<>]+>", key)}


def _is_embedding(headers: Any) -> bool:
    words = [key for key in headers if key in ANONYMOUS or re.fullmatch(r"<[^<>]+>", key)]
    return 0 < len(headers) == len(words)


def _kind(parts: Any) -> str:
    kind = kind_of(parts)
    decomposed = "dora_scale" in parts or "magnitude" in parts
    convolution = kind == "LoRA" and len(parts["down"].shape) == 4 and parts["down"].shape[2] > 1
    return ("DoRA" if kind == "LoRA" else f"{kind}, DoRA") if decomposed else "LoCon" if convolution else kind


def _part(module: str) -> str:
    if re.match(r"lora_te2|lycoris_te2|text_encoder_2|text_encoders\.clip_g|clip_g", module):
        return PARTS["text_encoder_2"]
    text = re.match(r"(lora|oft|lycoris)_te|text_|clip_l|(base_model\.model\.)?(text_model|encoder)\.", module)
    return PARTS["text_encoder" if text else "unet"]


def _triggers(stored: Stored) -> list[str]:
    """Return the author's trigger phrase, or else the most frequent tags of the training images."""
    phrase = stored.metadata.get("modelspec.trigger_phrase")
    if phrase:
        return [phrase[:200]]
    counts: Counter[str] = Counter()
    for tags in stored.told("ss_tag_frequency").values():
        if isinstance(tags, dict):
            counts.update({tag.strip()[:80]: n for tag, n in tags.items() if isinstance(n, int)})
    return [tag for tag, _ in counts.most_common(12)]
