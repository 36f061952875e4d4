"""From prompts to embeddings."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.text.tokenizer import CLIPTokenizer

__all__ = ["CLIPTokenizer"]


def __getattr__(name: str) -> Any:
    """Import the tokenizer lazily: it needs torch, while the prompt grammars do not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sfumato.text import tokenizer

    return getattr(tokenizer, name)
