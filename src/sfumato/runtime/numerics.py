"""The numeric policy: one table of the precision that each kind of device uses for each computation.

Who reads it: attention that stores its scores asks `softmax_dtype` and, where the answer is wider than its tensors, is
wrapped so that q, k, v and the mask are cast to it before scores and softmax, and the result is cast back; the plan
asks `vae_dtypes` and `is_emulated`; the finite guard asks `repeat_dtype` before it repeats a stage. Precisions and
kinds of device are plain names ("float16", "mps"), so that a plan is made without torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from sfumato.errors import UsageError

__all__ = [
    "POLICIES",
    "Policy",
    "best_dtype",
    "is_emulated",
    "policy_for",
    "repeat_dtype",
    "softmax_dtype",
    "vae_dtypes",
]

FOUR_BYTES = ("float32",)


@dataclass(frozen=True)
class Policy:
    """What a kind of device does with a model whose weights are in one precision.

    softmax     precision of attention's scores and softmax, where they are stored; fused kernels have their own
    upcast      the same, in models whose config has `upcast_attention` (Stable Diffusion 2.x)
    vae         precisions for the autoencoder, from the one to take first; one that the device emulates is passed over
    repeat      precision in which a stage with NaN or infinite values is repeated; None: there is no wider one to try
    emulated    "never", "always", or "without bfloat16": where the processor or card has no such instructions
    """

    softmax: str
    upcast: str
    vae: tuple[str, ...]
    repeat: str | None
    emulated: str = "never"


_FLOAT32 = Policy("float32", "float32", FOUR_BYTES, None)
_FLOAT64 = Policy("float64", "float64", ("float64",), None)

# float16 ends at 65504. Scores of Stable Diffusion 2.x leave that range on any device, and so do activations of some
# autoencoders, most of all SDXL's; bfloat16 has the range of float32. MPSGraph loses stored scores of both, from macOS
# 14.5 on at least (ComfyUI#3521, ComfyUI#4799, ComfyUI#15819); Metal's fused kernels sum in float32 (pytorch#181575).
# Few CPUs have instructions for float16 (CompVis#307).
POLICIES: dict[tuple[str, str], Policy] = {
    ("cpu", "float64"): _FLOAT64,
    ("cpu", "float32"): _FLOAT32,
    ("cpu", "bfloat16"): Policy("bfloat16", "bfloat16", ("bfloat16",), "float32", "without bfloat16"),
    ("cpu", "float16"): Policy("float16", "float32", ("bfloat16", "float32"), "float32", "always"),
    ("cuda", "float64"): _FLOAT64,
    ("cuda", "float32"): _FLOAT32,
    ("cuda", "bfloat16"): Policy("bfloat16", "bfloat16", ("bfloat16",), "float32", "without bfloat16"),
    ("cuda", "float16"): Policy("float16", "float32", ("bfloat16", "float32"), "float32"),
    ("mps", "float32"): _FLOAT32,
    ("mps", "bfloat16"): Policy("float32", "float32", ("bfloat16", "float32"), "float32", "without bfloat16"),
    ("mps", "float16"): Policy("float32", "float32", ("float32",), "float32"),
}


def policy_for(device: str, dtype: str) -> Policy:
    """The row of a kind of device and a precision. Raises `UsageError` for a pair that does not exist."""
    if (device, dtype) not in POLICIES:
        known = ", ".join(f"{name} on {kind}" for kind, name in POLICIES)
        raise UsageError(f"there is no {dtype} on {device}; use one of {known}")
    return POLICIES[device, dtype]


def softmax_dtype(device: str, dtype: str, *, upcast_attention: bool = False) -> str:
    """The precision of scores and softmax of a model in `dtype`; `upcast_attention` is what its config says."""
    policy = policy_for(device, dtype)
    return policy.upcast if upcast_attention else policy.softmax


def best_dtype(device: str, *, native_bfloat16: bool, proved: bool = False) -> str:
    """The fastest precision of text encoder and U-Net that is safe on a kind of device, where memory allows it.

    proved: half precision has passed its canaries here, which Metal needs.
    """
    half = {"cpu": native_bfloat16, "mps": proved, "cuda": True}[device]
    return ("float16" if device == "cuda" else "bfloat16") if half else "float32"


def vae_dtypes(device: str, dtype: str, *, native_bfloat16: bool, force_upcast: bool = True) -> tuple[str, ...]:
    """Safe precisions of the autoencoder beside a U-Net in `dtype`, best first; at least float32 is among them.

    force_upcast is what its config says: False where its authors have seen to it that float16 does.
    """
    wanted = policy_for(device, dtype).vae
    wanted = wanted if force_upcast else tuple(dict.fromkeys((dtype, *wanted)))
    return tuple(name for name in wanted if not is_emulated(device, name, native_bfloat16)) or FOUR_BYTES


def is_emulated(device: str, dtype: str, native_bfloat16: bool) -> bool:
    """Whether the device has no instructions for a precision, so that a wider one is faster."""
    emulated = policy_for(device, dtype).emulated
    return emulated == "always" or (emulated == "without bfloat16" and not native_bfloat16)


def repeat_dtype(device: str, dtype: str) -> str | None:
    """The wider precision in which a stage with NaN or infinite values is repeated, or None."""
    return policy_for(device, dtype).repeat
