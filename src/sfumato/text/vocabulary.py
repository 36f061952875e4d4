"""CLIP's vocabulary, which every Stable Diffusion model uses and no single-file checkpoint contains.

The package contains the merges of OpenAI's CLIP (MIT, clip/LICENSE), which determine its 49,408 tokens.
"""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from sfumato.text.tokenizer import END, START, CLIPTokenizer

__all__ = ["clip_tokenizer"]

MERGES = Path(__file__).parent / "clip" / "merges.txt.gz"


@cache
def clip_tokenizer(pad: str = END) -> CLIPTokenizer:
    """Return CLIP's tokenizer with the given padding token. It can be saved in the format of transformers."""
    merges = gzip.decompress(MERGES.read_bytes()).decode()
    names = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    config = names | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    files = {"merges.txt": merges, "vocab.json": json.dumps(_vocabulary(merges), ensure_ascii=False)}
    files |= {"tokenizer_config.json": json.dumps(config), "special_tokens_map.json": json.dumps(names)}
    with TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        return CLIPTokenizer.from_folder(Path(folder))


def _vocabulary(merges: str) -> dict[str, int]:
    """Build the vocabulary: all bytes as characters, the same at the end of a word, merged tokens, start and end."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that are printable characters
    letters = [chr(byte) for byte in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    pairs = ["".join(line.split()) for line in merges.splitlines()[1:] if line]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *pairs, START, END]
    return {token: number for number, token in enumerate(tokens)}
