"""What torch does slowly on a CPU, in C: attention in tiles that stay in the cache, normalization in two passes."""

from sfumato.kernels.build import CompilerError
from sfumato.kernels.library import LANES, Kernels, kernels_for

__all__ = ["LANES", "CompilerError", "Kernels", "kernels_for"]
