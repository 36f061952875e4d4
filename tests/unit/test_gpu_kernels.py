"""Kernels for GPUs: what they compute, by Triton's interpreter where there is none; and layers that call them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from sfumato import UNet2DConditionModel
from sfumato.kernels.gpu import gpu_kernels, is_plain
from support.checkpoints import UNET, XL, randomize

# In a process of its own: the interpreter is chosen before Triton is imported.
FORMULAS = """
import contextlib, torch, torch.nn.functional as F
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_default_device(device)
if device == "cpu":
    torch.cuda.device_of = lambda x: contextlib.nullcontext()
from sfumato.kernels import gpu, gpu_code
kernels, last = gpu.GpuKernels(gpu_code), torch.channels_last
def image(*shape): return (torch.randn(shape) * 2 + 3).half().contiguous(memory_format=last)
def check(y, z): assert (y.float() - z).norm() < 1e-3 * z.norm(), (y.float() - z).norm() / z.norm()
torch.manual_seed(0); torch.set_grad_enabled(False)
for b, c, side, groups, silu, adds in [(2, 320, 8, 32, True, 2), (1, 64, 5, 32, False, 0), (2, 1280, 4, 32, True, 1), (1, 80, 60, 8, True, 1), (2, 320, 64, 32, True, 2), (1, 96, 72, 3, False, 0)] + [(1, 64, 1480, 8, True, 0)] * (device == "cuda"):
    x, weight, bias = image(b, c, side, side), torch.randn(c).half(), torch.randn(c).half()
    added = torch.randn(adds, c).half() if adds else None
    y = kernels.group_norm(x, groups, weight, bias, 1e-5, added, silu=silu)
    assert y.is_contiguous(memory_format=last)
    z = F.group_norm(x.float() + (0 if added is None else added.float()[..., None, None]), groups, weight.float(), bias.float(), 1e-5)
    check(y, F.silu(z) if silu else z)
x = torch.randn(3, 7, 80).half()
value, gate = x.float().chunk(2, -1)
check(kernels.geglu(x), value * F.gelu(gate))
norm = torch.nn.LayerNorm(80).half()
x, y = torch.randn(3, 7, 80).half() + 2, torch.randn(3, 7, 80).half()
torch.nn.init.normal_(norm.weight); torch.nn.init.normal_(norm.bias)
total, out = kernels.add_norm(x, y, norm)
check(total, x.float() + y.float()); check(out, norm.float()(x.float() + y.float()))
total, out = kernels.add_norm(x, None, norm.half())
assert total is x; check(out, norm.float()(x.float()))
for ours, plain in gpu._samples(kernels, torch.device(device)):
    assert (ours.float() - plain).abs().max() < gpu.MOST_ERROR
x, y, bias = image(2, 40, 6, 6), image(2, 40, 6, 6), torch.randn(40).half()
check(kernels.biased_sum(x, y, bias), x.float() + y.float() + bias.float()[:, None, None])
"""


class PlainKernels:
    """The same functions in plain torch, on any device."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def takes(self, x):
        return x.is_contiguous(memory_format=torch.channels_last)

    def group_norm(self, x, groups, weight, bias, eps, added, *, silu):
        self.calls.append("group_norm")
        x = F.group_norm(x if added is None else x + added[:, :, None, None], groups, weight, bias, eps)
        return (F.silu(x) if silu else x).contiguous(memory_format=torch.channels_last)

    def add_norm(self, x, y, norm):
        self.calls.append("add_norm")
        x = x if y is None else x + y
        return x, norm(x)

    def geglu(self, x):
        self.calls.append("geglu")
        x, gate = x.chunk(2, dim=-1)
        return x * F.gelu(gate)

    def biased_sum(self, x, y, bias):
        self.calls.append("biased_sum")
        return (x + y + bias[:, None, None]).contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with torch for GPUs only")
def test_each_kernel_is_its_formula(tmp_path):
    import os

    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    subprocess.run([sys.executable, "-c", FORMULAS], check=True, env=environment)


@pytest.mark.parametrize("config", [UNET, XL], ids=["sd", "xl"])
def test_layers_that_call_kernels_compute_what_they_do_without(config, monkeypatch):
    unet, kernels = randomize(UNet2DConditionModel(**config)).double(), PlainKernels()
    for weight in unet.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    states = torch.randn(4, 5, config["cross_attention_dim"], dtype=torch.float64)
    added = (
        {"text_embeds": torch.randn(4, 40).double(), "time_ids": torch.ones(4, 6).double()} if config is XL else None
    )
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        plain = unet(x, 500.0, states, added_cond_kwargs=added).sample
        for module in ("blocks", "transformer"):
            monkeypatch.setattr(f"sfumato.models.{module}.gpu_kernels", lambda *_: kernels)
        fused = unet(x, 500.0, states, added_cond_kwargs=added).sample
    assert torch.allclose(fused, plain, rtol=1e-9, atol=1e-9)
    assert {name: kernels.calls.count(name) for name in ("group_norm", "geglu", "biased_sum", "add_norm")} == {
        "group_norm": sum(type(one).__name__ == "GroupNorm" for one in unet.modules()),
        "geglu": sum(type(one).__name__ == "GEGLU" for one in unet.modules()),
        "add_norm": 3 * sum(type(one).__name__ == "BasicTransformerBlock" for one in unet.modules()),
        "biased_sum": sum(type(one).__name__ == "ResnetBlock2D" for one in unet.modules()),
    }


def test_layers_with_hooks_and_those_of_others_are_called_themselves():
    class Adapted(torch.nn.Linear):
        pass

    hooked = torch.nn.Conv2d(2, 2, 1)
    assert is_plain(hooked)
    hooked.register_forward_hook(lambda *_: None)
    assert not is_plain(hooked)
    assert not is_plain(Adapted(2, 2))
    assert is_plain(torch.nn.LayerNorm(2))
    assert not is_plain(torch.nn.LayerNorm(2, bias=False))


def test_on_a_cpu_there_are_none():
    assert gpu_kernels(torch.zeros(1, 8, 2, 2, dtype=torch.float16)) is None
