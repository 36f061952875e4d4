"""Parses compiled programs (`model.mil`) in both dialects, `program(1.0)` and `program(1.3)`.

They differ in scalars: `tensor<int32, []>(1)` in the first, `int32(1)` in the second. A program consists of functions,
which consist of statements such as

    tensor<fp16, [1, 320]> y, tensor<int32, [1]> z = name(x = a, values = (b, c), k = int32(1))[name = string("y")];

Floating-point numbers are hexadecimal as in C, so reading them is exact. Each regular expression matches as much as
possible (a word, an argument or a list of numbers), so a program of 9,000 operations takes a fraction of a second.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod
from pathlib import Path
from string import whitespace

from sfumato.coreml.formats.blobs import WeightFiles
from sfumato.coreml.formats.mil_numbers import numbers_of, text_of
from sfumato.coreml.formats.pointers import read_bytes
from sfumato.coreml.formats.versions import opset_of
from sfumato.coreml.program import ARRAY_DTYPES, Argument, Function, Operation, Output, Program, TensorType, Value
from sfumato.errors import CheckpointError, ConfigError

__all__ = ["read_mil"]

_NAME = r"[^\s,=()\[\]<>{};\"]+"
_STRING = r'"(?:[^"\\]|\\.)*"'
_SCALARS = "|".join(sorted([*ARRAY_DTYPES, "string", "fp8e4m3fn", "fp8e5m2"], key=len, reverse=True))


def _words(pattern: str) -> re.Pattern[str]:
    """Compile a pattern in which a space stands for optional white space."""
    return re.compile(r"\s*" + pattern.replace(" ", r"\s*"), re.ASCII)


_HEAD = _words(r"program \( [\d.]+ \)")
_FUNCTION = _words(rf"func ({_NAME}) < ({_NAME}) > \( ")
_TYPE = _words(rf"(tensor < (\w+) , \[ ((?:(?:\d+|\?) (?:, |(?=\])))*)\] >|(?:{_SCALARS})\b)")
_SIDE = re.compile(r"\d+|\?", re.ASCII)
_OTHER_TYPE = _words(r"(list|tuple|dict|state) <")
_IDENTIFIER = _words(rf"({_NAME}) ")
_OPERATION = _words(rf"= ({_NAME}) \( ")
_KEY = _words(rf"({_NAME}) = ")
_REFERENCE = _words(rf"({_NAME}) (?=[,)\]])")
_BLOB = _words(
    rf"\( BLOBFILE \( path = (?:tensor < string , \[ \] >|string) \( ({_STRING}) \) , "
    r"offset = (?:tensor < uint64 , \[ \] >|uint64) \( (\d+) \) \) \)"
)
_NUMBERS = _words(r"\( ([^()\"]*)\)")
_STRINGS = _words(rf"\( \[? ((?:{_STRING}[\s,]*)*)\]? \)")
_ONE_STRING = re.compile(_STRING)
_QUOTED_OR_BRACKET = re.compile(rf"{_STRING}|[\[\]]")
_RESULT = _words(rf"\}} -> \( ((?:{_NAME} (?:, |(?=\))))*)\) ;")


def read_mil(path: Path) -> Program:
    """Parse the program in a `model.mil`; the weights it refers to are next to it.

    Raises `CheckpointError`, which names the line, if the file is missing or malformed, and `ConfigError` if it has
    state, lists, or operations with nested blocks, which are not supported.
    """
    try:
        text = read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not a text file; copy or download the model again") from error
    return _Reader(path, text).program()


class _Reader:
    """Reads the text in a single pass; `_at` is the current position."""

    def __init__(self, path: Path, text: str) -> None:
        self._path, self._text, self._at = path, text, 0
        self._weights = WeightFiles(path.parent)
        self._types: dict[str, TensorType] = {}

    def _fail(self, expected: str) -> CheckpointError:
        self._take("")
        line = self._text.count("\n", 0, self._at) + 1
        found = " ".join(self._text[self._at : self._at + 60].split()) or "the end of the file"
        return CheckpointError(
            f"{self._path}, line {line}: expected {expected}, found {found!r}; copy or download it again"
        )

    def _unsupported(self, what: str) -> ConfigError:
        line = self._text.count("\n", 0, self._at) + 1
        return ConfigError(f"{self._path}, line {line}: {what} is not supported; convert the model without it")

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self._text, self._at)
        if found:
            self._at = found.end()
        return found

    def _need(self, pattern: re.Pattern[str], expected: str) -> re.Match[str]:
        found = self._match(pattern)
        if not found:
            raise self._fail(expected)
        return found

    def _take(self, sign: str) -> bool:
        """Skip white space and consume the given sign if it comes next; returns whether it did."""
        text, at = self._text, self._at
        while at < len(text) and text[at] in whitespace:
            at += 1
        if text.startswith(sign, at):
            self._at = at + len(sign)
            return True
        return False

    def _give(self, sign: str) -> None:
        if not self._take(sign):
            raise self._fail(repr(sign))

    def _many(self, end: str, one: Callable[[], None]) -> None:
        """Read comma-separated items with `one`, up to and including the sign `end`."""
        while not self._take(end):
            one()
            if not self._take(","):
                self._give(end)
                return

    def program(self) -> Program:
        self._need(_HEAD, "program(1.0) or program(1.3)")
        self._skip_attributes()
        self._give("{")
        functions = {}
        while not self._take("}"):
            name, function = self._function()
            functions[name] = function
        if self._text[self._at :].strip():
            raise self._fail("the end of the program")
        if not functions:
            raise CheckpointError(f"{self._path} has no function; copy or download the model again")
        return Program(functions)

    def _skip_attributes(self) -> None:
        """Skip attributes in brackets, which only repeat what the interface of the program and its functions says."""
        start = self._at
        while self._take("["):
            depth = 1
            while depth:
                found = _QUOTED_OR_BRACKET.search(self._text, self._at)
                if not found:
                    self._at = start
                    raise self._fail("attributes that end with ']'")
                self._at = found.end()
                depth += {"[": 1, "]": -1}.get(found.group(), 0)

    def _function(self) -> tuple[str, Function]:
        name, opset = self._need(_FUNCTION, "a function").groups()
        inputs: list[Output] = []
        self._many(")", lambda: inputs.append(self._output()))
        self._skip_attributes()
        self._give("{")
        operations = []
        while not (result := self._match(_RESULT)):
            operations.append(self._operation())
        outputs = tuple(result.group(1).replace(",", " ").split())
        known = opset_of(opset)
        if known is None:
            raise self._unsupported(f"the opset {opset!r} of the function {name!r}")
        return name, Function(tuple(inputs), outputs, tuple(operations), known)

    def _operation(self) -> Operation:
        outputs = [self._output()]
        while self._take(","):
            outputs.append(self._output())
        kind = self._need(_OPERATION, "'=' and an operation").group(1)
        inputs: dict[str, Argument] = {}
        self._many(")", lambda: self._argument(inputs))
        attributes: dict[str, Value] = {}
        if self._take("["):
            self._many("]", lambda: self._attribute(attributes))
        if not self._take(";"):
            if self._take("{") or self._take("("):
                raise self._unsupported(f"the operation {kind!r} with nested blocks of operations")
            raise self._fail("';'")
        return Operation(kind, inputs, tuple(outputs), attributes)

    def _output(self) -> Output:
        type_ = self._type()
        if type_ is None:
            raise self._fail("a type")
        return Output(self._need(_IDENTIFIER, "a name").group(1), type_)

    def _argument(self, into: dict[str, Argument]) -> None:
        key = self._need(_KEY, "the name of an argument and '='").group(1)
        if not self._take("("):
            into[key] = (self._entry(),)
            return
        entries: list[str | Value] = []
        self._many(")", lambda: entries.append(self._entry()))
        into[key] = tuple(entries)

    def _entry(self) -> str | Value:
        reference = self._match(_REFERENCE)
        return reference.group(1) if reference else self._value()

    def _attribute(self, into: dict[str, Value]) -> None:
        key = self._need(_KEY, "the name of an attribute and '='").group(1)
        into[key] = self._value()

    def _type(self) -> TensorType | None:
        found = self._match(_TYPE)
        if not found:
            if other := self._match(_OTHER_TYPE):
                raise self._unsupported(f"a {other.group(1)}")
            return None
        word, dtype, sides = found.groups()
        if word not in self._types:
            if (dtype or word) not in (*ARRAY_DTYPES, "string"):
                raise self._unsupported(f"the type {dtype or word}")
            shape = (None if side == "?" else int(side) for side in _SIDE.findall(sides or ""))
            self._types[word] = TensorType(dtype or word, tuple(shape))
        return self._types[word]

    def _value(self) -> Value:
        type_ = self._type()
        if type_ is None:
            raise self._fail("a value")
        if blob := self._match(_BLOB):
            return self._weights.value(type_, text_of(blob.group(1)), int(blob.group(2)))
        if None in type_.shape:
            raise self._fail("a constant of known shape")
        count = prod(side or 0 for side in type_.shape)
        start = self._at
        if type_.dtype == "string":
            texts = tuple(text_of(one) for one in _ONE_STRING.findall(self._need(_STRINGS, "texts").group(1)))
            if len(texts) == count:
                return Value(type_, texts if type_.shape else texts[0])
        else:
            numbers = numbers_of(self._need(_NUMBERS, "numbers").group(1), type_)
            if numbers is not None:
                return Value(type_, numbers)
        self._at = start
        raise self._fail(f"{count} values of type {type_.dtype}")
