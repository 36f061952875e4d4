"""Drop-in networks: the same calls and results as the checkpoint's, computed by converted models.

They have a config but no layers. Inputs and outputs are float32 on the CPU. Rows fill a model's fixed batch; if the
last one is incomplete, a row is repeated, so that each row is computed as if it were alone.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sfumato.coreml.program import ARRAY_DTYPES
from sfumato.errors import CheckpointError, UsageError
from sfumato.models import AutoencoderKL, CLIPTextModel, UNet2DConditionModel
from sfumato.models.attention import Context
from sfumato.models.base import Model
from sfumato.models.blocks import Moment
from sfumato.models.text_encoder import CLIPTextOutput
from sfumato.models.unet import UNet2DConditionOutput
from sfumato.models.vae import AutoencoderKLOutput, DecoderOutput, DiagonalGaussianDistribution

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sfumato.coreml.backends import Chain
    from sfumato.coreml.program import Feature
    from sfumato.models.attention import AttentionFunction

__all__ = ["ConvertedAutoencoder", "ConvertedNetwork", "ConvertedTextEncoder", "ConvertedUNet", "sides"]

log = logging.getLogger("sfumato")

FIXED_ATTENTION = "how a converted network computes attention was fixed by its conversion; leave it as it is"


def sides(chain: Chain, name: str) -> tuple[int, ...]:
    """Return the shape of a model input. Raises `CheckpointError` if the input is missing or its shape is not fixed."""
    shape = _input(chain, name).type.shape
    known = tuple(side for side in shape if side is not None)
    if len(known) != len(shape):
        raise CheckpointError(f"the input {name!r} has no fixed size; convert the model for one size")
    return known


def _input(chain: Chain, name: str) -> Feature:
    for feature in chain.interface.inputs:
        if feature.name == name:
            return feature
    raise CheckpointError(f"the model has no input {name!r}; it is not one of Stable Diffusion 1.x or 2.x")


def _ask(chain: Chain, **inputs: Tensor) -> Tensor:
    """Return the first output as float32, for inputs that are cast to the interface's dtypes."""
    arrays = {
        name: value.contiguous().numpy().astype(ARRAY_DTYPES[_input(chain, name).type.dtype])
        for name, value in inputs.items()
    }
    outputs = chain.predict(arrays)
    return torch.from_numpy(np.array(outputs[chain.interface.outputs[0].name], dtype=np.float32))


def _rows(count: int, batch: int) -> Iterator[tuple[list[int], int]]:
    """Yield the rows of each call of a model with a fixed batch, and how many of them are not padding."""
    for first in range(0, count, batch):
        yield [min(row, count - 1) for row in range(first, first + batch)], min(batch, count - first)


class ConvertedNetwork(Model):
    """Base of the converted networks: no weights to move, cast or save, and a fixed attention."""

    remedy = (
        "a converted model computes in half precision, whose range ends at 65504; use --compute-unit CPU_ONLY, "
        "or the checkpoint itself (sfumato generate)"
    )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of inputs and outputs: float32."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """The device of inputs and outputs: the CPU."""
        return torch.device("cpu")

    @property
    def chains(self) -> tuple[Chain, ...]:
        """The models behind this network."""
        raise NotImplementedError

    def load(self) -> None:
        """Load the models now instead of on first use."""
        for chain in self.chains:
            chain.load()

    def release(self) -> None:
        """Release the models until they are used again."""
        for chain in self.chains:
            chain.release()

    def save_pretrained(self, *arguments: Any, **options: Any) -> None:
        """Raise `UsageError`: only the original checkpoint can be saved."""
        raise UsageError("a converted network has no weights to save; save its checkpoint instead")

    def set_attention(self, attention: AttentionFunction) -> None:
        """Raise `UsageError`: attention was fixed by the conversion."""
        raise UsageError(FIXED_ATTENTION)

    def set_attention_slice(self, slice_size: str | int | None = "auto") -> None:
        """Raise `UsageError`: attention was fixed by the conversion."""
        raise UsageError(FIXED_ATTENTION)

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        raise UsageError("a converted network cannot be moved or cast; choose a compute unit when loading it")


class ConvertedTextEncoder(ConvertedNetwork, CLIPTextModel):
    """The text encoder: input_ids (1, S) -> last_hidden_state (1, S, C), one prompt at a time."""

    def __init__(self, config: Any, chain: Chain) -> None:
        Model.__init__(self, config)
        self.chain = chain

    @property
    def chains(self) -> tuple[Chain, ...]:
        """The single model."""
        return (self.chain,)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        more: Tensor | None = None,
    ) -> CLIPTextOutput | tuple[Any, ...]:
        """Like `CLIPTextModel`, but raises `UsageError` for masks and for hidden states (clip_skip), which it lacks."""
        if output_hidden_states:
            raise UsageError("clip_skip needs inner layers, which a converted text encoder does not return; omit it")
        if more is not None:
            raise UsageError("a converted text encoder supports only the tokens it was converted with; omit embeddings")
        if attention_mask is not None:
            raise UsageError("a converted text encoder takes no attention_mask; omit it")
        parts = []
        for rows, real in _rows(input_ids.shape[0], sides(self.chain, "input_ids")[0]):
            parts.append(_ask(self.chain, input_ids=input_ids[rows])[:real])
        last = torch.cat(parts)
        pooled = last[torch.arange(last.shape[0]), self._end_of_text(input_ids)]
        return CLIPTextOutput(last, pooled) if return_dict else (last, pooled)


class ConvertedUNet(ConvertedNetwork, UNet2DConditionModel):
    """The U-Net: sample (N, C, h, w), timestep (N,), encoder_hidden_states (N, C', 1, S) -> noise_pred (N, C, h, w)."""

    def __init__(self, config: Any, chain: Chain) -> None:
        Model.__init__(self, config)
        self.chain = chain
        self._told = False

    @property
    def chains(self) -> tuple[Chain, ...]:
        """The network, in one model or several chunks."""
        return (self.chain,)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents it was converted for."""
        _, _, height, width = sides(self.chain, "sample")
        return height, width

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | Moment,
        encoder_hidden_states: Tensor | Context,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        *,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        return_dict: bool = True,
        **residuals: Any,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Like `UNet2DConditionModel`, for the one size of the model.

        Raises `UsageError` for class labels, masks, and residuals of control networks.
        """
        if any(one is not None and len(one) for one in residuals.values()):
            raise UsageError("a converted U-Net takes no control; use the checkpoint it was converted from")
        time, context = timestep, encoder_hidden_states
        if not isinstance(time, Moment):
            time = self.moment(sample, time, class_labels, timestep_cond, added_cond_kwargs)
        if not isinstance(context, Context):
            context = Context(context, attention_mask, encoder_attention_mask)
        if context.mask is not None or context.states_mask is not None:
            raise UsageError("a converted U-Net takes no attention masks; omit them")
        pictures, sample = sample.shape[0], context.widen(sample)
        count, states = sample.shape[0], context.states.transpose(1, 2).unsqueeze(2)
        times = time.activated[:, 0].expand(count) if time.activated.shape[0] == 1 else time.activated[:, 0]
        # Keep the guidance halves of an image in one call, so that it is computed the same way alone and in a batch.
        order = [half * pictures + picture for picture in range(pictures) for half in range(count // pictures)]
        parts = []
        for places, real in _rows(count, sides(self.chain, "sample")[0]):
            rows = [order[place] for place in places]
            inputs = {"sample": sample[rows], "timestep": times[rows], "encoder_hidden_states": states[rows]}
            parts.append(_ask(self.chain, **inputs)[:real])
        together = torch.cat(parts)
        x = torch.empty_like(together)
        x[order] = together
        return UNet2DConditionOutput(x) if return_dict else (x,)

    def read(self, context: Context) -> None:
        """Do nothing: a converted model projects the prompt again in every call."""

    def moment(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
    ) -> Moment:
        """Return the timestep itself, (B, 1) or (1, 1); the model computes its embedding."""
        if class_labels is not None or timestep_cond is not None or added_cond_kwargs:
            raise UsageError(
                "a converted U-Net takes no class_labels, no timestep_cond and no added_cond_kwargs; omit them"
            )
        times = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1, 1)
        self._tell_of_rounding(times)
        return Moment(times)

    def _tell_of_rounding(self, times: Tensor) -> None:
        """Warn once if half precision rounds the timestep, as it does for schedulers with fractional timesteps."""
        rounded = _input(self.chain, "timestep").type.dtype == "fp16" and not torch.equal(times.half().float(), times)
        if self._told or not rounded:
            return
        self._told = True
        log.warning(
            "this U-Net reads timesteps in half precision: %.2f becomes %.2f; schedulers with whole timesteps, such as "
            "ddim, pndm and dpmpp_2m, lose nothing",
            times[0, 0],
            times.half()[0, 0],
        )


class ConvertedAutoencoder(ConvertedNetwork, AutoencoderKL):
    """The VAE: z (1, C, h, w) -> image (1, 3, H, W); x (1, 3, H, W) -> latent (1, 2 C, h, w), mean and logvar."""

    def __init__(self, config: Any, decoder: Chain, encoder: Chain | None = None) -> None:
        Model.__init__(self, config)
        self.decoding, self.encoding = decoder, encoder

    @property
    def chains(self) -> tuple[Chain, ...]:
        """The decoder, and the encoder if there is one."""
        return (self.decoding,) if self.encoding is None else (self.decoding, self.encoding)

    def load(self) -> None:
        """Load the decoder; the encoder, which only image-to-image needs, is loaded on first use."""
        self.decoding.load()

    def enable_tiling(self) -> None:
        """Raise `UsageError`: a converted model has a fixed size."""
        raise UsageError("a converted VAE has a fixed image size; do not enable tiling")

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Like `AutoencoderKL.encode`; raises `UsageError` if there is no converted encoder."""
        if self.encoding is None:
            raise UsageError(
                "image-to-image needs a VAE encoder, which these models lack; convert it too "
                "(sfumato coreml convert --convert-vae-encoder)"
            )
        posterior = DiagonalGaussianDistribution(self._through(self.encoding, "x", x))
        return AutoencoderKLOutput(posterior) if return_dict else (posterior,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Like `AutoencoderKL.decode`."""
        sample = self._through(self.decoding, "z", z)
        return DecoderOutput(sample) if return_dict else (sample,)

    @staticmethod
    def _through(chain: Chain, name: str, x: Tensor) -> Tensor:
        batch = sides(chain, name)[0]
        return torch.cat([_ask(chain, **{name: x[rows]})[:real] for rows, real in _rows(x.shape[0], batch)])
