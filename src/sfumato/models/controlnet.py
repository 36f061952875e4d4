"""ControlNet: a copy of the U-Net's encoder that reads a control image ("Adding Conditional Control to Text-to-Image
Diffusion Models", arXiv 2302.05543).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.checkpoints.control_file import control_class, open_control_file
from sfumato.configs import ControlNetConfig, UNet2DConditionConfig
from sfumato.errors import CheckpointError
from sfumato.models.attention import Context
from sfumato.models.blocks import Moment
from sfumato.models.unet import UNetEncoder
from sfumato.outputs import Output

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sfumato.checkpoints.single_file import SingleFile
    from sfumato.models.unet import UNet2DConditionModel

__all__ = ["ControlNetConditioningEmbedding", "ControlNetModel", "ControlNetOutput", "layer_scales", "zeroed"]

Layer = TypeVar("Layer", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class ControlNetOutput(Output):
    """Residuals to add to the U-Net: one for each skip connection, and one for the middle block."""

    down_block_res_samples: tuple[Tensor, ...]
    mid_block_res_sample: Tensor


def layer_scales(number: int, *, guess: bool) -> list[float]:
    """Return the scales of `number` residuals: all 1 or, in guess mode, rising from 0.1 to 1 with depth."""
    return torch.logspace(-1, 0, number).tolist() if guess else [1.0] * number


class ControlNetConditioningEmbedding(nn.Module):
    """Convolutions that reduce a control image to the size of the latents."""

    def __init__(self, channels: int, widths: tuple[int, ...], out_channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, wider in pairwise(widths):
            self.blocks.append(nn.Conv2d(width, width, 3, padding=1))
            self.blocks.append(nn.Conv2d(width, wider, 3, padding=1, stride=2))
        self.conv_out = zeroed(nn.Conv2d(widths[-1], out_channels, 3, padding=1))

    def forward(self, picture: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, h, w)."""
        x = F.silu(self.conv_in(picture))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class ControlNetModel(UNetEncoder):
    """A ControlNet, for any Stable Diffusion model whose U-Net has the same encoder."""

    config_class = ControlNetConfig
    role = "controlnet"
    weights_name = "diffusion_pytorch_model"
    config: ControlNetConfig
    remedy = "check the control image that was given"

    def __init__(self, config: ControlNetConfig | None = None, **values: object) -> None:
        super().__init__(config, **values)
        config = self.config
        self._build_input()
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(
            config.conditioning_channels, config.conditioning_embedding_out_channels, config.block_out_channels[0]
        )
        self.down_blocks, self.controlnet_down_blocks = nn.ModuleList(), nn.ModuleList()
        levels = self._levels()
        for width in self._build_down(levels):
            self.controlnet_down_blocks.append(zeroed(nn.Conv2d(width, width, 1)))
        width = config.block_out_channels[-1]
        self.controlnet_mid_block = zeroed(nn.Conv2d(width, width, 1))
        self._build_middle(levels[-1])

    @classmethod
    def _open_file(cls, name: Any, **options: Any) -> SingleFile:
        file = open_control_file(name, **options)
        wanted = control_class(file)
        if wanted != cls.__name__:
            raise CheckpointError(f"{file.path} is not a {cls.__name__}; open it with {wanted}.from_single_file")
        return file

    @property
    def unet_config(self) -> UNet2DConditionConfig:
        """The config of the U-Net whose encoder this is a copy of."""
        return self.config.unet

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DConditionModel,
        controlnet_conditioning_channel_order: str = "rgb",
        conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256),
        load_weights_from_unet: bool = True,
        conditioning_channels: int = 3,
    ) -> Self:
        """Build a ControlNet to train for a U-Net, with a copy of its encoder and zero-initialized outputs."""
        shared = {one.name for one in fields(cls.config_class)} - {"extra"}
        values = {key: value for key, value in unet.config.to_dict().items() if key in shared}
        values["controlnet_conditioning_channel_order"] = controlnet_conditioning_channel_order
        values["conditioning_embedding_out_channels"] = list(conditioning_embedding_out_channels)
        model = cls.from_config(values | {"conditioning_channels": conditioning_channels})
        if load_weights_from_unet:
            own = model.state_dict().keys()
            model.load_state_dict({key: one for key, one in unet.state_dict().items() if key in own}, strict=False)
        return model

    def embed(self, picture: Tensor) -> Tensor:
        """Encode control images (B, 3, H, W), usually in [0, 1], to (B, C, h, w). Does not depend on the timestep."""
        swapped = self.config.controlnet_conditioning_channel_order == "bgr"
        return self.controlnet_cond_embedding(picture.flip(1) if swapped else picture)

    def steer(self, sample: Tensor, time: Moment, context: Context, hint: Tensor) -> list[Tensor]:
        """Return the residuals for the U-Net, unscaled, the middle block's last.

        sample: (B, C, H, W). context: of B prompts or a multiple of B. hint: from `embed`, for one image or B images.
        Residuals that do not depend on the prompt may have the sample's batch size.
        """
        x = self.conv_in(sample) + hint
        if context.mask is not None or time.activated.shape[0] > x.shape[0]:
            x = context.widen(x)
        states = [x]
        for block in self.down_blocks:
            x, results = block(x, time, context)
            states += results
        x = x if self.mid_block is None else self.mid_block(x, time, context)
        added = [layer(state) for layer, state in zip(self.controlnet_down_blocks, states, strict=True)]
        added.append(self.controlnet_mid_block(x))
        return [one.mean(dim=(2, 3), keepdim=True) for one in added] if self.config.global_pool_conditions else added

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | Moment,
        encoder_hidden_states: Tensor | Context,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        *,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> ControlNetOutput | tuple[tuple[Tensor, ...], Tensor]:
        """Return the residuals to add to a U-Net with the same inputs.

        controlnet_cond: control images (B, 3, 8H, 8W) for samples (B, C, H, W). conditioning_scale: the strength.
        guess_mode: weaken the residuals of shallow layers. Other arguments are those of the U-Net.
        """
        time = timestep
        if not isinstance(time, Moment):
            time = self.moment(sample, time, class_labels, timestep_cond, added_cond_kwargs)
        context = self._context(encoder_hidden_states, sample, attention_mask, None)
        added = self.steer(sample, time, context, self.embed(controlnet_cond))
        output = self.scaled(added, conditioning_scale, guess=guess_mode)
        return output if return_dict else (output.down_block_res_samples, output.mid_block_res_sample)

    def scaled(self, added: Sequence[Tensor], scale: float, *, guess: bool) -> ControlNetOutput:
        """Scale the residuals from `steer`; in guess mode, also by a factor per layer."""
        scales = layer_scales(len(added), guess=guess and not self.config.global_pool_conditions)
        *down, middle = (one * (scale * layer) for one, layer in zip(added, scales, strict=True))
        return ControlNetOutput(tuple(down), middle)


def zeroed(layer: Layer) -> Layer:
    """Set a layer's weights to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
