"""Numbers and strings in `model.mil`, read and written exactly."""

from __future__ import annotations

import re

import numpy as np

from sfumato.coreml.program import ARRAY_DTYPES, TensorType

__all__ = ["numbers_of", "quoted", "text_of", "written_array"]

_BRACKETS = str.maketrans("[]", "  ")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}
_ESCAPED = {"\\": r"\\", '"': r"\"", "\n": r"\n", "\t": r"\t", "\r": r"\r"}


def text_of(quoted_text: str) -> str:
    """Return the text of a quoted string, with escapes replaced."""
    inner = quoted_text[1:-1]
    return re.sub(r"\\(.)", lambda found: _ESCAPES.get(found[1], found[1]), inner) if "\\" in inner else inner


def quoted(text: str) -> str:
    """Return a text in quotation marks, escaped."""
    return '"' + "".join(_ESCAPED.get(letter, letter) for letter in text) + '"'


def numbers_of(text: str, type_: TensorType) -> np.ndarray | None:
    """Parse a bracketed list of numbers; None if it does not match the type and shape."""
    words = [word for word in (part.strip() for part in text.translate(_BRACKETS).split(",")) if word]
    dtype = ARRAY_DTYPES[type_.dtype]
    try:
        if dtype == np.bool_:
            numbers = np.array([{"true": True, "false": False}[word] for word in words], np.bool_)
        elif dtype.kind == "f":
            wide = np.array([float.fromhex(word) if "x" in word else float(word) for word in words], np.float64)
            with np.errstate(over="raise"):
                numbers = wide.astype(dtype)
        else:
            numbers = np.array([int(word) for word in words], dtype)
        return numbers.reshape([side or 0 for side in type_.shape])
    except (KeyError, ValueError, OverflowError, FloatingPointError):
        return None


def written_array(array: np.ndarray) -> str:
    """Format an array as nested bracketed lists; a scalar has no brackets."""
    if array.ndim == 0:
        return _number(array.item())
    parts = map(written_array, array) if array.ndim > 1 else map(_number, array.tolist())
    return f"[{', '.join(parts)}]"


def _number(number: float | bool) -> str:
    if isinstance(number, bool):
        return "true" if number else "false"
    if isinstance(number, int):
        return str(number)
    mantissa, exponent, power = number.hex().partition("p")
    if not exponent:
        return mantissa  # inf, -inf and nan
    return mantissa.rstrip("0").rstrip(".") + "p" + power if "." in mantissa else number.hex()
