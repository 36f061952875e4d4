"""The prediction for each step of the loop: the U-Net's output, guided by the prompt."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from sfumato.errors import UsageError
from sfumato.models.attention import Context
from sfumato.models.blocks import Moment, sinusoidal_embedding
from sfumato.pipelines.repair import computed_in_float32
from sfumato.pipelines.residuals import Read, together
from sfumato.pipelines.reused import Reused
from sfumato.runtime.chunks import tile_starts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sfumato.models.unet import UNet2DConditionModel
    from sfumato.pipelines.conditioning import Branches, Conditioning
    from sfumato.pipelines.residuals import Added, Steered
    from sfumato.request import Fast

__all__ = ["Guidance", "compose", "guide", "guide_both", "rescale"]

# Micro-batches of different prompts that keep their keys and values between steps, about 8 MB each for Stable Diffusion
# 1.5. If there are more, they are projected again at each step, which takes 0.5% of its time.
KEPT = 4


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598, eq. 6): away from the negative prompt, towards the prompt."""
    return unconditional + scale * (conditional - unconditional)


def compose(branches: Sequence[Tensor], weights: Branches) -> Tensor:
    """Combine the predictions of joined prompts (arXiv 2206.01714, eq. 11): u + sum of w_i (c_i - u).

    branches: u followed by each c_i; or only the c_i, for their mean weighted by the positive weights.
    """
    if not weights:
        return branches[-1]
    conditional = branches[-len(weights) :]
    if len(branches) == len(weights):
        positive = [weight.clamp(min=1e-6) for weight in weights]
        total = torch.stack(positive).sum(0)
        return torch.stack([one * (w / total).to(one) for one, w in zip(conditional, positive, strict=True)]).sum(0)
    u = branches[0]
    return u + torch.stack([w.to(one) * (one - u) for one, w in zip(conditional, weights, strict=True)]).sum(0)


def guide_both(none: Tensor, image: Tensor, both: Tensor, image_scale: float, scale: float) -> Tensor:
    """Guidance by image and prompt (InstructPix2Pix, arXiv 2211.09800, eq. 3): towards the image, then towards both."""
    return none + image_scale * (image - none) + scale * (both - image)


def rescale(guided: Tensor, conditional: Tensor, factor: float) -> Tensor:
    """Rescale the guided prediction to the conditional one's standard deviation (arXiv 2305.08891, eq. 15 and 16)."""
    dims = tuple(range(1, guided.ndim))
    spread = conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return factor * (guided * spread) + (1 - factor) * guided


@dataclass(frozen=True, eq=False)
class _Part:
    """One micro-batch: its conditioning, the U-Net's inputs from it, and the extra channels for all branches."""

    told: Conditioning
    read: Read
    extra: Tensor | None
    reused: Reused | None = None  # what it keeps between steps, where the request is for less work
    _tiles: dict[tuple[int, int], _Part] = field(default_factory=dict)

    def within(self, row: slice, column: slice) -> _Part:
        """Return the part for one tile of the latents. Cached, as control networks read their images once per run."""
        if (row.start, column.start) not in self._tiles:
            told = replace(self.told, steered=tuple(one.within(row, column) for one in self.told.steered))
            extra = None if self.extra is None else self.extra[:, :, row, column]
            self._tiles[row.start, column.start] = _Part(told, self.read, extra)
        return self._tiles[row.start, column.start]


@dataclass(kw_only=True)
class Guidance:
    """The U-Net with its conditioning.

    `tell`, `steer`, `change` and `show` change the conditioning between steps. scale: at most 1 means no guidance;
    image_scale: for the second of three branches, which reads only the image; micro_batch: images per U-Net call (None:
    all); tile: side of the latents' tiles (None: no tiles); step: the current step, from 0, and the number of steps;
    times: the timesteps to come, whose embeddings are computed together;
    fast: what to reuse between steps, without tiles or networks beside the U-Net.
    Predictions are float32 (float64 for a float64 U-Net), so that guidance does not round twice.
    """

    unet: UNet2DConditionModel
    conditioning: Conditioning
    times: tuple[float, ...] = ()
    scale: float
    rescale: float = 0.0
    image_scale: float = 1.0
    micro_batch: int | None = None
    tile: int | None = None
    step: tuple[int, int] = (0, 1)
    fast: Fast | None = None
    _read: list[_Part] = field(default_factory=list, init=False)  # for each micro-batch
    _alone: list[_Part] = field(default_factory=list, init=False)  # without guidance, where `fast` leaves it out

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Scaled latents (B, C, h, w) at timestep t -> the prediction (B, C, h, w)."""
        narrow = x.to(self.unet.dtype)
        size = self.micro_batch or x.shape[0]
        if not self._read or self._read[0].read.context.states.dtype != narrow.dtype:  # a repair changes the precision
            self._read, self._alone = self._reading(self._told, size), []
        every = self._read if self._guides() else self._unguided(size)
        moments: dict[int, Moment] = {}  # one if it depends only on time, else one per different input
        predicted = []
        for part, own in zip(narrow.split(size), every, strict=True):
            shared = id(own.read) if own.read.with_time else 0
            if shared not in moments:
                moments[shared] = self.moment(part, t, own.read)
            predicted.append(self._in_tiles(part, t, moments[shared], own).to(x.dtype))
        return torch.cat(predicted)

    def _guides(self) -> bool:
        """Whether this step computes the direction of guidance, or has none."""
        return self._told.branches == 1 or all(
            one.reused is None or one.reused.guides(*self.step) for one in self._read
        )

    def _unguided(self, size: int) -> list[_Part]:
        """What each micro-batch reads for its prompt alone; what it has kept is the same."""
        if not self._alone:
            parts = self._reading(self._told.unguided, size)
            self._alone = [replace(one, reused=own.reused) for one, own in zip(parts, self._read, strict=True)]
        return self._alone

    def moment(self, x: Tensor, t: float, read: Read) -> Moment:
        """Return the time embedding of timestep t for one micro-batch's inputs."""
        with_time = dict(read.with_time)
        condition = with_time.pop("timestep_cond", None)
        condition = self._scale_condition(x[:1].to(self.unet.dtype)) if condition is None else condition
        return read.moments.at(self.unet, x.to(self.unet.dtype), t, self.times, with_time, condition)

    @property
    def reads(self) -> list[Read]:
        """The different inputs whose time embeddings a call reads, once there was one."""
        every = {id(own.read): own.read for own in self._read}
        return list(every.values()) if self._read[0].read.with_time else [self._read[0].read]

    def state(self, x: Tensor) -> tuple[object, ...] | None:
        """Return all that a prediction depends on besides the values of x and t, to compare.

        None if a call depends on more, which changes from step to step: networks beside the U-Net, what it reuses of
        others, or a repair.
        """
        if self.conditioning.steered or self.fast is not None or self.unet.is_gradient_checkpointing:
            return None
        if self.unet.compute_dtype is not None:
            return None
        numbers = (self.scale, self.rescale, self.image_scale, self.micro_batch, self.tile)
        return (x.shape, x.dtype, self.unet.dtype, *numbers, *self._read)

    def _in_tiles(self, x: Tensor, t: float, moment: Moment, own: _Part) -> Tensor:
        """Predict tile by tile, and blend overlapping tiles (MultiDiffusion, arXiv 2302.08113, eq. 5)."""
        size = max(x.shape[2:]) if self.tile is None else self.tile
        if max(x.shape[2:]) <= size:
            return self._predict(x, t, moment, own)
        rows, columns = ([slice(start, start + size) for start in tile_starts(side, size)] for side in x.shape[2:])
        total, shares = torch.zeros((), device=x.device), torch.zeros(x.shape[2:], device=x.device)
        for row in rows:
            for column in columns:
                tile = self._predict(x[:, :, row, column], t, moment, own.within(row, column))
                down, across = (_ramp(side, tile) for side in tile.shape[2:])
                window = down[:, None] * across
                total = total if total.ndim else tile.new_zeros(*tile.shape[:2], *x.shape[2:])
                total[:, :, row, column] += tile * window
                shares[row, column] += window
        return total / shares

    @staticmethod
    def _added(steered: Steered, x: Tensor, t: float, read: Read) -> Added:
        """Compute residuals in the network's own precision, or in float32 while the U-Net is being repaired."""
        repaired = x.dtype == torch.float32 and steered.network.dtype in (torch.float16, torch.bfloat16)
        with computed_in_float32(steered.network) if repaired else nullcontext():
            return {where: [one.to(x.dtype) for one in own] for where, own in steered.added(x, t, read).items()}

    def _predict(self, x: Tensor, t: float, moment: Moment, own: _Part) -> Tensor:
        beside = (self._added(one, x, t, own.read) for one in own.told.steered if one.active(*self.step))
        residuals, weights = together(beside, own.read.context), own.told.weights
        if own.extra is not None:
            x = torch.cat([x.repeat(own.extra.shape[0] // x.shape[0], 1, 1, 1), own.extra], dim=1)
        if own.reused is None:
            output = self.unet(x, moment, own.read.context, return_dict=False, **residuals)[0]
        else:
            output = own.reused.output(self.unet, x, moment, own.read.context, *self.step)
        if self.unet.config.is_k:  # k-diffusion's velocity has the opposite sign, and an unused variance channel
            output = -output[:, :-1]
        if own.told.branches == 1:
            kept = None if self._told.branches == 1 or own.reused is None else own.reused.direction
            return output if kept is None else output.to(kept.dtype) + (self.scale - 1) * kept
        every = output.to(_wide(output)).chunk(own.told.branches)
        # Guidance leads away from these: the unconditional branch, and for editing also the image without a prompt.
        others = every[: -own.told.prompts]
        conditional = compose(every[max(0, len(others) - 1) :], weights)
        if not others:
            return conditional
        if own.reused is not None:
            own.reused.direction = conditional - others[-1]
        if len(others) == 2:
            guided = guide_both(others[0], others[1], conditional, self.image_scale, self.scale)
        else:
            guided = guide(others[0], conditional, self.scale)
        return rescale(guided, conditional, self.rescale) if self.rescale > 0 else guided

    @property
    def _told(self) -> Conditioning:
        return self.conditioning if self.scale > 1 else self.conditioning.unguided

    def _reading(self, told: Conditioning, size: int) -> list[_Part]:
        """Create each micro-batch's inputs. Equal inputs are shared, along with their keys and values."""
        every: list[_Part] = []
        keep, dtype = self.conditioning.pictures <= KEPT * size, self.unet.dtype
        for part in told.split(size):
            states, with_time = part.joined("embeds").to(dtype), part.with_time
            if every and every[-1].read.reads(states, with_time):
                read = every[-1].read
            else:
                own = part.branches - part.prompts, part.prompts
                images = [one.told(self.unet, own, part.pictures, states) for one in part.images]
                read = Read(Context(states, keep=keep, images=images), with_time, part.prompts)
            reused = None if self.fast is None else Reused(self.fast)
            every.append(_Part(part, read, part.joined("extra").to(dtype) if part.extra else None, reused))
        for context in {id(part.read): part.read.context for part in every}.values():
            if context.keep:
                self.unet.read(context)
        return every

    def one_at_a_time(self) -> None:
        """Use one image per U-Net call from here on."""
        self.micro_batch, self._read = 1, []

    def steer(self, scale: float, rescale: float) -> None:
        """Change the guidance from here on. A model distilled for guidance keeps its first scale.

        Raises `UsageError` if guidance is turned on without negative embeddings.
        """
        self.rescale = rescale
        if scale == self.scale or self.unet.config.reads_guidance:
            return
        if scale > 1 >= self.scale and self.conditioning.branches == self.conditioning.prompts:
            raise UsageError(
                f"guidance_scale became {scale:g} between steps, but there are no negative embeddings; begin with a "
                "guidance_scale above 1, or have the callback return prompt_embeds with the negative ones first"
            )
        if (scale > 1) != (self.scale > 1):
            self._read = []
        self.scale = scale

    def change(self, prompts: Conditioning) -> None:
        """Use other prompts from here on."""
        self._read = []
        self.conditioning = self.conditioning.prompted(prompts)

    def show(self, steered: tuple[Steered, ...]) -> None:
        """Use other control images from here on."""
        self._read = []
        self.conditioning = replace(self.conditioning, steered=steered)

    def tell(self, **joined: Tensor) -> None:
        """Use other embeddings, pooled prompts or sizes: (B, …), which ends guidance, or (2B, …), negative first."""
        self._read = []
        self.conditioning = self.conditioning.told(**joined)

    def _scale_condition(self, x: Tensor) -> Tensor | None:
        """Embed the guidance scale, for models distilled for guidance (arXiv 2310.04378, section 4.2); else None."""
        channels = self.unet.config.time_cond_proj_dim
        if channels is None or not self.unet.config.reads_guidance:
            return None
        scale = torch.full((x.shape[0],), (self.scale - 1) * 1000, device=x.device)
        return sinusoidal_embedding(scale, channels, flip_sin_to_cos=False, freq_shift=1).to(x.dtype)


def _ramp(side: int, like: Tensor) -> Tensor:
    """Return weights (side,) that increase from the ends to the middle of a tile."""
    place = torch.arange(side, dtype=torch.float32, device=like.device)
    return torch.minimum(place + 1, side - place)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
