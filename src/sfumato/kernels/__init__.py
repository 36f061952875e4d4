"""C kernels for what torch does slowly on a CPU: cache-tiled attention and two-pass normalization."""

from sfumato.kernels.build import CompilerError
from sfumato.kernels.library import LANES, Kernels, kernels_for

__all__ = ["LANES", "CompilerError", "Kernels", "kernels_for"]
