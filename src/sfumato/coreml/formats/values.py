"""Core ML's data types as numbers, and the byte encoding of their values."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from sfumato.coreml.formats.bits import pack, unpack
from sfumato.coreml.program import ARRAY_DTYPES, SUBBYTE_BITS, Operation, Value
from sfumato.errors import UsageError

__all__ = [
    "BLOB_TYPES",
    "DATA_TYPES",
    "array_from_bytes",
    "array_from_numbers",
    "bytes_from_array",
    "checked",
    "is_literal",
    "is_weight",
    "member_of",
]

# MILSpec.DataType. The two 8-bit floating point types are only named in errors.
DATA_TYPES: Mapping[int, str] = {
    1: "bool",
    2: "string",
    10: "fp16",
    11: "fp32",
    12: "fp64",
    13: "bf16",
    21: "int8",
    22: "int16",
    23: "int32",
    24: "int64",
    25: "int4",
    31: "uint8",
    32: "uint16",
    33: "uint32",
    34: "uint64",
    35: "uint4",
    36: "uint2",
    37: "uint1",
    38: "uint6",
    39: "uint3",
    40: "fp8e4m3fn",
    41: "fp8e5m2",
}

# Data types of records in weight files (StorageFormat.hpp of Core ML's open source part).
BLOB_TYPES: Mapping[int, str] = {
    1: "fp16",
    2: "fp32",
    3: "uint8",
    4: "int8",
    5: "bf16",
    6: "int16",
    7: "uint16",
    8: "int4",
    9: "uint1",
    10: "uint2",
    11: "uint4",
    12: "uint3",
    13: "uint6",
    14: "int32",
    15: "uint32",
    16: "fp8e4m3fn",
    17: "fp8e5m2",
}

# The field that holds an inline value; all other dtypes use "bytes".
_MEMBERS = {
    "fp32": "floats",
    "fp64": "doubles",
    "int16": "ints",
    "uint16": "ints",
    "int32": "ints",
    "int64": "longInts",
    "uint64": "longInts",
    "bool": "bools",
    "string": "strings",
}
# Weight files for iOS 17 and earlier support only these dtypes, later ones all of `BLOB_TYPES`.
_OLD_BLOBS = ("fp16", "fp32", "uint8", "int8")
_ALL_BLOBS_FROM = 9
_LEAST_STORED = 10


def checked(value: Value) -> np.ndarray | tuple[str, ...]:
    """Return a constant's values or texts for writing. Raises `UsageError` if they do not match its type."""
    data, type_ = value.read(), value.type
    if isinstance(data, np.ndarray):
        if data.dtype == ARRAY_DTYPES.get(type_.dtype) and data.shape == type_.shape:
            return data
        found = f"an array of {data.dtype} and shape {list(data.shape)}"
    else:
        texts = (data,) if isinstance(data, str) else data
        if type_.dtype == "string" and len(texts) == prod(side or 0 for side in type_.shape):
            return texts
        found = f"{len(texts)} texts"
    raise UsageError(f"a constant of type {type_} contains {found}; make both the same")


def member_of(dtype: str) -> str:
    """Return the field of `TensorValue` that holds values of a dtype."""
    return _MEMBERS.get(dtype, "bytes")


def is_literal(operation: Operation) -> bool:
    """Return whether constants in an operation are arguments; those of `const` and `constexpr_…` are data."""
    return operation.type != "const" and not operation.type.startswith("constexpr_")


def is_weight(value: Value, spec_version: int, literal: bool) -> bool:
    """Return whether a constant belongs in the weight file rather than in the program.

    It does if it is already stored in one or, unless it is a `literal` argument, if it has at least ten elements, as in
    coremltools; but only in dtypes that weight files of the specification version support.
    """
    known = tuple(BLOB_TYPES.values()) if spec_version >= _ALL_BLOBS_FROM else _OLD_BLOBS
    count = prod(side or 0 for side in value.type.shape)
    wished = value.stored or (not literal and count >= _LEAST_STORED)
    return wished and count > 0 and value.type.dtype in known


def array_from_bytes(data: Any, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the array in a buffer of exactly the bytes of that dtype and shape; a view unless it must be unpacked."""
    if dtype in SUBBYTE_BITS:
        return unpack(np.frombuffer(data, np.uint8), dtype, prod(shape)).reshape(shape)
    if dtype == "bf16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.frombuffer(data, ARRAY_DTYPES[dtype].newbyteorder("<")).reshape(shape)


def bytes_from_array(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return the bytes (uint8) of an array in C order; bfloat16 is rounded to nearest, ties to even."""
    if dtype in SUBBYTE_BITS:
        return pack(array, dtype)
    if dtype == "bf16":
        bits = np.ascontiguousarray(array).reshape(-1).view(np.uint32)
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        rounded = np.where(nan, bits | 0x400000, bits + (0x7FFF + ((bits >> 16) & 1)))
        return (rounded >> 16).astype("<u2").view(np.uint8)
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    return little.reshape(-1).view(np.uint8)


def array_from_numbers(numbers: Any, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return an array of a sequence of numbers, which must match the shape."""
    wide = np.int64 if np.issubdtype(ARRAY_DTYPES[dtype], np.integer) else ARRAY_DTYPES[dtype]
    with np.errstate(over="ignore"):  # numbers too large for float16 become infinite
        return np.array(numbers, wide).astype(ARRAY_DTYPES[dtype]).reshape(shape)
