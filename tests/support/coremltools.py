"""coremltools, the judge of what we write, without its noise."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

__all__ = ["import_coremltools", "quiet"]


@contextmanager
def quiet() -> Iterator[None]:
    """A block in which other people's warnings and log lines are not heard."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@cache
def import_coremltools() -> ModuleType:
    """The module `coremltools`, with its parts for optimization and for reading programs.

    Importing it warns of untested versions and of the parts that only macOS has.
    """
    with quiet():
        import coremltools
        import coremltools.converters.mil.frontend.milproto.load
        import coremltools.optimize.coreml
    return coremltools
