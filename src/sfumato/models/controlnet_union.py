"""ControlNet Union: one ControlNet for several kinds of control images, also combined (ControlNet++, xinsir 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.configs import ControlNetUnionConfig
from sfumato.errors import UsageError
from sfumato.models.blocks import TimestepEmbedding
from sfumato.models.controlnet import ControlNetModel, ControlNetOutput, zeroed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sfumato.models.attention import Context

__all__ = ["ControlNetUnionModel"]


class _Attention(nn.Module):
    """Attention of each token only to itself, which reduces to its value projection.

    The published code attends along the batch, to the tokens of other images. For a single image, this is the same.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) -> (B, C)."""
        width = x.shape[1]
        return self.out_proj(F.linear(x, self.in_proj_weight[2 * width :], self.in_proj_bias[2 * width :]))


class _Perceptron(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) -> (B, C)."""
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn, self.ln_1 = _Attention(width), nn.LayerNorm(width)
        self.mlp, self.ln_2 = _Perceptron(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) -> (B, C)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class ControlNetUnionModel(ControlNetModel):
    """A ControlNet that takes the kind of each control image as a number, its mode."""

    config_class = ControlNetUnionConfig
    config: ControlNetUnionConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: ControlNetUnionConfig | None = None, **values: object) -> None:
        super().__init__(config, **values)
        config, width = self.config, self.config.num_trans_channel
        self.task_embedding = nn.Parameter(width**0.5 * torch.randn(config.num_control_type, width))
        self.transformer_layes = nn.ModuleList(_Block(width) for _ in range(config.num_trans_layer))  # as in files
        self.spatial_ch_projs = zeroed(nn.Linear(width, config.num_proj_channel))
        waves = (config.addition_time_embed_dim or 0) * config.num_control_type
        self.control_add_embedding = TimestepEmbedding(waves, self.unet_config.time_channels, "silu")

    def embed_all(self, pictures: Sequence[Tensor], modes: Sequence[int], scales: Sequence[float]) -> Tensor:
        """Encode control images (B, 3, H, W) of these modes, scaled, to (B, C, h, w). Does not depend on the timestep.

        Raises `UsageError` if the network does not have a mode.
        """
        total = torch.zeros((), dtype=self.dtype, device=self.device)
        for picture, mode, scale in zip(pictures, modes, scales, strict=True):
            if not 0 <= mode < self.config.num_control_type:
                last = self.config.num_control_type - 1
                raise UsageError(f"this network has the control modes 0 to {last}, and {mode} is none of them")
            seen = self.embed(picture)
            token = scale * (seen.mean(dim=(2, 3)) + self.task_embedding[mode])
            for block in self.transformer_layes:
                token = block(token)
            total = total + scale * (seen + self.spatial_ch_projs(token)[:, :, None, None])
        return total

    def types(self, modes: Sequence[int]) -> Tensor:
        """Return a vector (1, types) with 1 for the given modes."""
        found = torch.zeros(1, self.config.num_control_type, device=self.device)
        found[0, list(modes)] = 1
        return found

    def _further(self, time: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        types = given["control_type"]
        waves = self._sinusoid(types.flatten(), self.config.addition_time_embed_dim or 0).view(types.shape[0], -1)
        return time + self.control_add_embedding(waves.to(time.dtype))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | Context,
        controlnet_cond: Sequence[Tensor],
        control_type: Tensor,
        control_type_idx: Sequence[int],
        conditioning_scale: float | Sequence[float] = 1.0,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        *,
        from_multi: bool = False,
        guess_mode: bool = False,
        return_dict: bool = True,
        **told: Any,
    ) -> ControlNetOutput | tuple[tuple[Tensor, ...], Tensor]:
        """Return the residuals to add to a U-Net with the same inputs.

        controlnet_cond: control images (B, 3, 8H, 8W) of the modes `control_type_idx`; control_type (B, types): 1 for
        these modes. The scale applies to the residuals for one image or with from_multi, and to the images if there are
        several. Other arguments are those of `ControlNetModel`.
        """
        count = len(controlnet_cond)
        given: Any = conditioning_scale
        scales: list[float] = list(given) if isinstance(given, (list, tuple)) else [given] * count
        alone = from_multi or count == 1
        hint = self.embed_all(controlnet_cond, control_type_idx, [1.0] * count if alone else scales)
        time = self.moment(
            sample, timestep, added_cond_kwargs=dict(added_cond_kwargs or {}) | {"control_type": control_type}
        )
        context = self._context(encoder_hidden_states, sample, told.get("attention_mask"), None)
        added = self.steer(sample, time, context, hint)
        output = self.scaled(added, scales[0] if alone else 1.0, guess=guess_mode)
        return output if return_dict else (output.down_block_res_samples, output.mid_block_res_sample)
