"""The numeric policy: one table of the precision that each kind of device uses for each computation.

It is used in three places. Attention that stores its scores calls `softmax_dtype` and, if that is wider than its
tensors, casts q, k, v and the mask before computing scores and softmax, and casts the result back. The plan calls
`vae_dtypes` and `is_emulated`. The finite guard calls `repeat_dtype` before it repeats a stage. Dtypes and device types
are plain names ("float16", "mps"), so that planning does not need torch.
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
    """What a device type does for a model whose weights have a given dtype.

    softmax     dtype of attention scores and softmax, if they are stored; fused kernels have their own
    upcast      the same for models whose config has `upcast_attention` (Stable Diffusion 2.x)
    vae         dtypes for the autoencoder in order of preference; those that the device emulates are skipped
    repeat      dtype for repeating a stage that produced NaN or infinite values; None if there is no wider one
    emulated    "never", "always", or "without bfloat16": if the CPU or GPU has no such instructions
    """

    softmax: str
    upcast: str
    vae: tuple[str, ...]
    repeat: str | None
    emulated: str = "never"


_FLOAT32 = Policy("float32", "float32", FOUR_BYTES, None)
_FLOAT64 = Policy("float64", "float64", ("float64",), None)

# float16 ends at 65504. Attention scores of Stable Diffusion 2.x exceed that on any device, and so do activations of
# some autoencoders, notably SDXL's; bfloat16 has the range of float32. On Metal, stored scores fail in both, at
# least since macOS 14.5 (ComfyUI#3521, ComfyUI#4799, ComfyUI#15819); its fused kernels sum in float32 (pytorch#181575).
# Few CPUs have float16 instructions (CompVis#307).
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
    """Return the policy for a device type and dtype. Raises `UsageError` for an unsupported pair."""
    if (device, dtype) not in POLICIES:
        known = ", ".join(f"{name} on {kind}" for kind, name in POLICIES)
        raise UsageError(f"there is no {dtype} on {device}; use one of {known}")
    return POLICIES[device, dtype]


def softmax_dtype(device: str, dtype: str, *, upcast_attention: bool = False) -> str:
    """Return the dtype of scores and softmax for a model in `dtype`; `upcast_attention` comes from its config."""
    policy = policy_for(device, dtype)
    return policy.upcast if upcast_attention else policy.softmax


def best_dtype(device: str, *, native_bfloat16: bool, proved: bool = False) -> str:
    """Return the fastest safe dtype for the text encoder and U-Net on a device type, if memory allows it.

    proved: half precision has passed its canaries on this machine, which Metal needs.
    """
    half = {"cpu": native_bfloat16, "mps": proved, "cuda": True}[device]
    return ("float16" if device == "cuda" else "bfloat16") if half else "float32"


def vae_dtypes(device: str, dtype: str, *, native_bfloat16: bool, force_upcast: bool = True) -> tuple[str, ...]:
    """Return safe dtypes for the autoencoder of a U-Net in `dtype`, best first; never empty.

    force_upcast: from its config; False means that its authors made it safe in float16.
    """
    wanted = policy_for(device, dtype).vae
    wanted = wanted if force_upcast else tuple(dict.fromkeys((dtype, *wanted)))
    return tuple(name for name in wanted if not is_emulated(device, name, native_bfloat16)) or FOUR_BYTES


def is_emulated(device: str, dtype: str, native_bfloat16: bool) -> bool:
    """Return whether the device lacks instructions for a dtype, so that a wider one is faster."""
    emulated = policy_for(device, dtype).emulated
    return emulated == "always" or (emulated == "without bfloat16" and not native_bfloat16)


def repeat_dtype(device: str, dtype: str) -> str | None:
    """Return the wider dtype for repeating a stage that produced NaN or infinite values, or None."""
    return policy_for(device, dtype).repeat
