"""From words to embeddings."""

from sfumato.text.tokenizer import CLIPTokenizer

__all__ = ["CLIPTokenizer"]
