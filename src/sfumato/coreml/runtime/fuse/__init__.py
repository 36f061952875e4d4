"""Fuses chains of operations: group normalization, and attention in every common form.

A chain is replaced only if its intermediate values are not used elsewhere. Its result is rounded to fp16 once, at its
end, instead of after each operation, so intermediate values cannot overflow.
"""

from __future__ import annotations

from collections.abc import Mapping

from sfumato.coreml.program import Function
from sfumato.coreml.runtime.call import Binder
from sfumato.coreml.runtime.fuse.attention import fuse_cores
from sfumato.coreml.runtime.fuse.graph import Graph
from sfumato.coreml.runtime.fuse.group_norm import GROUP_NORM, fuse_group_norms
from sfumato.coreml.runtime.fuse.heads import FUSED_ATTENTION, join_attentions

__all__ = ["FUSED", "fused"]

FUSED: Mapping[str, Binder] = {**FUSED_ATTENTION, **GROUP_NORM}


def fused(function: Function) -> Function:
    """Return the same function with chains replaced by equivalent single operations of `FUSED`.

    A malformed function is returned unchanged: the planner reports what is wrong with it.
    """
    graph = Graph(function)
    try:
        fuse_group_norms(graph)
        fuse_cores(graph)
        join_attentions(graph)
    except (LookupError, ValueError):
        return function
    return graph.function()
