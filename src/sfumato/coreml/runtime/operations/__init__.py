"""The operations of ML Programs, as documented in coremltools' MIL definitions."""

from __future__ import annotations

from collections.abc import Mapping

from sfumato.coreml.runtime.call import Binder
from sfumato.coreml.runtime.operations.convolution import CONVOLUTION
from sfumato.coreml.runtime.operations.elementwise import ELEMENTWISE
from sfumato.coreml.runtime.operations.images import IMAGES
from sfumato.coreml.runtime.operations.indexing import INDEXING
from sfumato.coreml.runtime.operations.layout import LAYOUT
from sfumato.coreml.runtime.operations.normalization import NORMALIZATION
from sfumato.coreml.runtime.operations.products import PRODUCTS
from sfumato.coreml.runtime.operations.reduction import REDUCTION

__all__ = ["OPERATIONS"]

OPERATIONS: Mapping[str, Binder] = {
    **CONVOLUTION,
    **ELEMENTWISE,
    **IMAGES,
    **INDEXING,
    **LAYOUT,
    **NORMALIZATION,
    **PRODUCTS,
    **REDUCTION,
}
