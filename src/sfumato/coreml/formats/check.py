"""Validates a model's structure, so that errors appear when it is read or written, not when it runs."""

from __future__ import annotations

from sfumato.coreml.program import Function, Interface, Model, Program

__all__ = ["flaw"]


def flaw(model: Model) -> str | None:
    """Return what is wrong with a model as part of a sentence, or None.

    Every value must have a unique name and be computed before it is read, and the functions must match the interface.
    The models of a pipeline are checked, but not how they pass features to each other.
    """
    if not isinstance(model.body, Program):
        found = ((name, flaw(inner)) for name, inner in model.body)
        return next((f"in the model {name!r}, {words}" for name, words in found if words), None)
    functions = model.body.functions
    interfaces = dict(model.interfaces) or {model.default_function: model.interface}
    for name in (model.default_function, *interfaces):
        if name not in functions:
            return f"there is no function {name!r}"
    for name, function in functions.items():
        words = _flaw_of_function(function) or (name in interfaces and _misfit(function, interfaces[name]))
        if words:
            return f"in the function {name!r}, {words}"
    return None


def _flaw_of_function(function: Function) -> str | None:
    known = {one.name for one in function.inputs}
    for operation in function.operations:
        if operation.type == "const" and "val" not in operation.attributes:
            return f"the constant {[one.name for one in operation.outputs]} has no value"
        for name in operation.names:
            if name not in known:
                return f"an operation {operation.type} reads {name!r} before it is computed"
        for output in operation.outputs:
            if output.name in known:
                return f"{output.name!r} is computed twice"
            known.add(output.name)
    return next((f"{name!r} is returned but not computed" for name in function.outputs if name not in known), None)


def _misfit(function: Function, interface: Interface) -> str | None:
    taken, given = {one.name for one in function.inputs}, {one.name for one in interface.inputs}
    if taken != given:
        return f"the input {min(taken ^ given)!r} is only one of the program's and of the interface's"
    returned = (one.name for one in interface.outputs if one.name not in function.outputs)
    return next((f"the output {name!r} of the interface is not returned" for name in returned), None)
