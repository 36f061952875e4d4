"""A matrix: a TOML file that defines all combinations of its prompts, seeds and settings."""

from __future__ import annotations

import itertools
import re
import tomllib
from math import prod
from typing import TYPE_CHECKING, Annotated, Any

from sfumato.errors import ConfigError, UsageError
from sfumato.files import inside, read_bytes
from sfumato.values import Within, check_value, reason

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["read_matrix"]

# More rows than this must be a mistake.
MOST_ROWS = 10**8
Texts = Annotated[tuple[str, ...], Within(1, 10**6), "a list of texts, or the name of a text file next to the matrix"]
Seeds = Annotated[tuple[int, ...], Within(1, 10**6)]
Count = Annotated[int, Within(1, 10**6)]


def read_matrix(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a matrix: for each setting, each prompt with each value of its wildcards, and each seed.

    `seeds` is a list, or the number of seeds; `__name__` in a prompt is replaced by each value of `wildcards.name`.
    Instead of a list of texts, a matrix can name a text file next to it, with one text per line. All other keys are
    fields of every row.

    Raises `UsageError`.
    """
    try:
        table = tomllib.loads(read_bytes(path).decode("utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not valid TOML ({reason(error)}); correct it") from error
    prompts = _texts(path, "prompts", table.pop("prompts", None))
    wildcards = table.pop("wildcards", {})
    seeds, settings = table.pop("seeds", 1), table.pop("settings", [{}])
    try:
        check_value(str(path), "seeds", seeds, Count | Seeds)
        check_value(str(path), "settings", settings, tuple[dict[str, Any], ...])
        check_value(str(path), "wildcards", wildcards, dict[str, Any])
    except ConfigError as error:
        raise UsageError(str(error)) from error
    values = {name: _texts(path, f"wildcards.{name}", given) for name, given in wildcards.items()}
    names = [_names(path, prompt, values) for prompt in prompts]
    texts = sum(prod(len(values[name]) for name in one) for one in names)
    rows = texts * len(settings) * (seeds if isinstance(seeds, int) else len(seeds))
    if rows > MOST_ROWS:
        raise UsageError(f"{path} has {rows:,} rows, but the limit is {MOST_ROWS:,}; remove some wildcards")
    given = [{}] * seeds if isinstance(seeds, int) else [{"seed": seed} for seed in seeds]
    for setting in settings:
        for prompt, own in zip(prompts, names, strict=True):
            for text in _filled(prompt, own, values):
                for seed in given:
                    yield table | setting | {"prompt": text} | seed


def _texts(path: Path, key: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        lines = read_bytes(inside(path.parent, value)).decode("utf-8-sig").splitlines()
        value = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    try:
        check_value(str(path), key, value, Texts)
    except ConfigError as error:
        raise UsageError(str(error)) from error
    return tuple(value)


def _names(path: Path, prompt: str, values: dict[str, tuple[str, ...]]) -> list[str]:
    names = list(dict.fromkeys(re.findall(r"__([\w-]+?)__", prompt)))
    for name in names:
        if name not in values:
            raise UsageError(f"{path}: the prompt {prompt!r} uses the wildcard __{name}__; define wildcards.{name}")
    return names


def _filled(prompt: str, names: list[str], values: dict[str, tuple[str, ...]]) -> Iterator[str]:
    for chosen in itertools.product(*(values[name] for name in names)):
        text = prompt
        for name, value in zip(names, chosen, strict=True):
            text = text.replace(f"__{name}__", value)
        yield text
