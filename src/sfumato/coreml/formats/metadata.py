"""`metadata.json` of compiled models, which Xcode displays and some apps use to identify a model."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from math import log2
from typing import Any

from sfumato.coreml.formats.values import is_literal, is_weight
from sfumato.coreml.formats.versions import SYSTEMS
from sfumato.coreml.program import Feature, Function, Model, Operation, Value

__all__ = ["metadata_json"]

_WORDS = {"fp16": "Float16", "fp32": "Float32", "fp64": "Double"}
_COMPUTED = ("fp16", "fp32", "int32")

# Operations are counted by the version of their definition, not of the program. These were redefined for iOS 17 and
# iOS 18, or are new there; most others for iOS 16. Apple publishes no list: this one is taken from compiled files.
_FROM_17 = """
    add batch_norm cast ceil clip concat conv conv_transpose equal expand_dims floor floor_div gather gather_along_axis
    gather_nd greater greater_equal instance_norm inverse l2_norm layer_norm less less_equal linear log logical_and
    logical_not logical_or logical_xor matmul maximum minimum mod mul not_equal pow real_div reduce_argmax reduce_argmin
    reshape rsqrt slice_by_index slice_by_size squeeze sub topk transpose
"""
_FROM_18 = """
    constexpr_blockwise_shift_scale constexpr_lut_to_dense constexpr_lut_to_sparse
    constexpr_sparse_blockwise_shift_scale constexpr_sparse_to_dense scaled_dot_product_attention slice_update
"""
# Not redefined for iOS 16: counted without a version there, as are those that were never redefined later.
_ONLY_15 = """
    concat expand_dims fill identity non_zero one_hot pad range_1d select shape slice_by_index slice_by_size split
    squeeze stack tile transpose upsample_nearest_neighbor
"""


def metadata_json(model: Model, name: str) -> str:
    """Return the contents of `metadata.json` for a model with one program, stored under a name."""
    function = model.program.functions[model.default_function]
    entries = {
        "metadataOutputVersion": "3.0",
        "shortDescription": model.description,
        "author": model.author,
        "license": model.license,
        "version": model.version,
        "storagePrecision": _storage(function, model.spec_version),
        "computePrecision": _mixed(_WORDS.get(one, one.capitalize()) for one in _COMPUTED if one in _dtypes(function)),
    }
    told = {key: text for key, text in entries.items() if text}
    schema = {
        "inputSchema": [_feature(one) for one in model.interface.inputs],
        "outputSchema": [_feature(one) for one in model.interface.outputs],
        "stateSchema": [],
        "modelParameters": [],
        "specificationVersion": model.spec_version,
        "mlProgramOperationTypeHistogram": _histogram(function, model.spec_version),
        "isUpdatable": "0",
        "availability": dict(SYSTEMS[model.spec_version]),
        "modelType": {"name": "MLModelType_mlProgram"},
        "userDefinedMetadata": dict(model.metadata),
        "generatedClassName": re.sub(r"\W", "_", name),
        "method": "predict",
    }
    return json.dumps([told | schema], indent=2, separators=(",", " : "), ensure_ascii=False) + "\n"


def _feature(feature: Feature) -> dict[str, str]:
    word = _WORDS.get(feature.type.dtype, feature.type.dtype.capitalize())
    sides = [str(side) for side in feature.type.shape]
    return {
        "name": feature.name,
        "type": "MultiArray",
        "dataType": word,
        "shape": f"[{', '.join(sides)}]",
        "formattedType": f"MultiArray ({' '.join((word, ' × '.join(sides))).strip()})",
        "shortDescription": feature.description,
        "isOptional": str(int(feature.optional)),
        "hasShapeFlexibility": "0",
    }


def _histogram(function: Function, spec_version: int) -> dict[str, int]:
    counts = Counter(one.type for one in function.operations if one.type != "const")
    return {_versioned(kind, spec_version): count for kind, count in sorted(counts.items())}


def _versioned(kind: str, spec_version: int) -> str:
    """Return an operation's name with the version of its definition, such as "Ios16.realDiv"."""
    camel = "".join(part[:1].upper() + part[1:] for part in kind.split("_"))
    from_17, from_18, only_15 = (kind in words.split() for words in (_FROM_17, _FROM_18, _ONLY_15))
    if spec_version >= 9 and (from_17 or from_18):
        version = "Ios18"
    elif spec_version >= 8 and from_17:
        version = "Ios17"
    elif spec_version >= 7 and not only_15:
        version = "Ios16"
    else:
        return camel
    return f"{version}.{camel[0].lower()}{camel[1:]}"


def _dtypes(function: Function) -> set[str]:
    return {output.type.dtype for operation in function.operations for output in operation.outputs}


def _storage(function: Function, spec_version: int) -> str:
    """Describe how the weights are stored; empty if there are none."""
    found = set()
    for operation in function.operations:
        bits = _palette_bits(operation)
        if bits is not None:
            found.add(f"Palettized ({bits} bits)")
            continue
        for value in _values(operation):
            if is_weight(value, spec_version, is_literal(operation)):
                found.add(_WORDS.get(value.type.dtype, value.type.dtype.capitalize()))
    return _mixed(sorted(found))


def _palette_bits(operation: Operation) -> int | None:
    if operation.type != "constexpr_lut_to_dense":
        return None
    entries = operation.inputs.get("lut", ())
    lut = operation.attributes.get("lut") or (entries[0] if entries else None)
    # In iOS 18, the last axis holds the vectors of a palette, and the one before it the entries.
    return int(log2(lut.type.shape[-1 if len(lut.type.shape) == 1 else -2] or 1)) if isinstance(lut, Value) else None


def _values(operation: Operation) -> Iterator[Value]:
    yield from operation.attributes.values()
    for argument in operation.inputs.values():
        yield from (entry for entry in argument if isinstance(entry, Value))


def _mixed(words: Any) -> str:
    listed = list(words)
    return listed[0] if len(listed) == 1 else f"Mixed ({', '.join(listed)})" if listed else ""
