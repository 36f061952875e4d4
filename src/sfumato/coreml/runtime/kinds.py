"""ML Program types as torch dtypes, and file values as tensors.

All floating-point values are stored and computed in float32 (float64 for "fp64"); values of type fp16 are only rounded
to fp16. Unsigned types without arithmetic in torch are stored in the next wider signed type.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from sfumato.coreml.program import SUBBYTE_BITS

__all__ = ["HELD", "WORDS", "half_rounded", "tensor_of"]

HELD: Mapping[str, torch.dtype] = {
    "fp16": torch.float32,
    "fp32": torch.float32,
    "bf16": torch.float32,
    "fp64": torch.float64,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "uint16": torch.int32,
    "uint32": torch.int64,
    "uint64": torch.int64,
    "bool": torch.bool,
    "int4": torch.int8,
    **{name: torch.uint8 for name in SUBBYTE_BITS if name.startswith("u")},
}

# Names that the inputs "dtype" and "output_dtype" of operations may use in addition to those of `HELD`.
WORDS: Mapping[str, str] = {"float16": "fp16", "float32": "fp32", "float64": "fp64", "float": "fp32", "int": "int32"}


def half_rounded(value: torch.Tensor) -> torch.Tensor:
    """Round each element to the nearest fp16 value (IEEE 754, ties to even; 65,520 and above become infinite)."""
    return value.half().float()


def tensor_of(array: np.ndarray, dtype: str) -> torch.Tensor:
    """Convert an array of a MIL dtype to a tensor, in the dtype that holds it; it may share the array's memory."""
    held = HELD[dtype]
    if array.flags.writeable and array.flags.c_contiguous and array.dtype.isnative:
        return torch.from_numpy(array).to(held)
    # Torch warns about read-only arrays, so numpy converts those.
    tensor = torch.empty(array.shape, dtype=held)
    np.copyto(tensor.numpy(), array, casting="unsafe")
    return tensor
