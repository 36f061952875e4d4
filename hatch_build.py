"""Builds platform wheels with compiled kernels if SFUMATO_BUILD_KERNELS=1, else pure Python wheels."""

from __future__ import annotations

import os
import runpy
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface):
    """Adds the compiled kernels to the wheel and sets its platform tag; any Python 3 can use it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the kernels. Raises `RuntimeError` without a C compiler, instead of building a wheel without them."""
        if self.target_name != "wheel" or version == "editable" or os.environ.get("SFUMATO_BUILD_KERNELS") != "1":
            return
        kernels = Path(self.root, "src", "sfumato", "kernels")
        variants = runpy.run_path(str(kernels / "variants.py"))
        compiler = variants["compiler"]()
        if compiler is None:
            raise RuntimeError("SFUMATO_BUILD_KERNELS=1 needs a C compiler (cc, gcc or clang)")
        self._made = tempfile.TemporaryDirectory()
        for path in variants["build_variants"](compiler, kernels, Path(self._made.name)):
            build_data["force_include"][str(path)] = f"sfumato/kernels/built/{path.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the temporary files, which are now in the wheel."""
        if hasattr(self, "_made"):
            self._made.cleanup()
