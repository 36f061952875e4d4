"""The parts of a request that consist of several fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from sfumato.errors import UsageError
from sfumato.request.records import Place, Record, Seed, Share, Weight, check_word
from sfumato.values import Within

__all__ = [
    "LARGEST_SEEDS",
    "AdapterFile",
    "Adapters",
    "EmbeddingFile",
    "Embeddings",
    "Framed",
    "Framing",
    "FreeU",
    "GuidanceInterval",
    "Interval",
    "Noise",
    "Noised",
    "Reweighted",
]

# The random number generators for `rng`, and the largest seed of each.
LARGEST_SEEDS = {"torch": 2**63 - 1, "numpy": 2**32 - 1, "cuda": 2**63 - 1}


@dataclass(frozen=True, kw_only=True)
class GuidanceInterval(Record):
    """The steps with guidance. All others compute only the prompt, as with scale 1 (arXiv 2404.07724, section 3).

    start, stop           fractions of the steps: step i of n, counted from 0, is guided if start <= i / n < stop
    sigma_min, sigma_max  noise levels: a step at sigma is guided if sigma_min < sigma <= sigma_max; None: no limit
    """

    start: Share = 0.0
    stop: Share = 1.0
    sigma_min: Annotated[float, Within(0, 1e6)] = 0.0
    sigma_max: Annotated[float, Within(0, 1e6)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start >= self.stop or self.sigma_min >= (self.sigma_max or 1e7):
            raise UsageError("a guidance interval must end above its start; lower its start, or raise its end")

    @property
    def by_noise(self) -> bool:
        """Whether it is limited by noise levels."""
        return self.sigma_min > 0 or self.sigma_max is not None

    def holds(self, index: int, total: int, sigma: float = 1.0) -> bool:
        """Return whether step `index`, counted from 0, of `total` is guided. sigma: its noise level."""
        steps = self.start <= index / total < self.stop
        return steps and (not self.by_noise or self.sigma_min < sigma <= (self.sigma_max or 1e7))


@dataclass(frozen=True, kw_only=True)
class FreeU(Record):
    """FreeU (arXiv 2309.11497, section 3.2): reweights the inputs of the U-Net's first two up blocks.

    Half of the channels from the previous block are multiplied by b1 (first block) or b2 (second block), and the low
    frequencies of the skip connections by s1 or s2. Good values depend on the family: b1 1.5, b2 1.6, s1 0.9, s2 0.2
    for Stable Diffusion 1.x.
    """

    b1: Weight
    b2: Weight
    s1: Weight
    s2: Weight


@dataclass(frozen=True, kw_only=True)
class Framing(Record):
    """Size conditioning of Stable Diffusion XL and its refiner (arXiv 2307.01952, section 2.2).

    original_size           (height, width) of the original image; the generated image's if None
    crops_coords_top_left   (top, left) of the crop; (0, 0) if None
    target_size             (height, width) after scaling; the generated image's if None
    aesthetic_score         1 to 10; the family's value for a good image if None
    """

    original_size: tuple[Place, Place] | None = None
    crops_coords_top_left: tuple[Place, Place] | None = None
    target_size: tuple[Place, Place] | None = None
    aesthetic_score: float | None = None


@dataclass(frozen=True, kw_only=True)
class Noise(Record):
    """How to generate noise, to reproduce images of other programs.

    variation_seed      interpolate the initial noise spherically towards that of this seed (A1111's variations)
    variation_strength  how far, from 0 (not at all) to 1 (completely)
    step_seed           generate the steps' noise separately, from the seed plus this number (A1111's ENSD); if None,
                        continue with the generator of the initial noise
    step_rng            the generator for the steps' noise, as in `rng`; if None, the same
    posterior           "sample" as in the ecosystem: encode the input image with noise, drawn before all other noise;
                        or "mean": without noise
    """

    variation_seed: Seed | None = None
    variation_strength: Share = 0.0
    step_seed: Annotated[int, Within(-(2**31), 2**32)] | None = None
    step_rng: str | None = None
    posterior: Annotated[str, "sample or mean"] = "sample"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_word("step_rng", self.step_rng or "torch", LARGEST_SEEDS)
        check_word("posterior", self.posterior, ("sample", "mean"))


@dataclass(frozen=True, kw_only=True)
class AdapterFile(Record):
    """A file that changes a checkpoint's weights (LoRA or related), and its strength.

    file         the path of a safetensors file
    weight       its strength; may be negative or above 1
    text_weight  its strength for the text encoders; if None, the same
    parts        strengths by the beginning of module names, {"unet.up_blocks.1": 0.5}; the longest match applies
    partial      apply the known part of a file that also has unknown modules or keys
    sha256       the required hash of the file, as recorded in recipes
    """

    file: Annotated[str, Within(1, 4096)]
    weight: Weight = 1.0
    text_weight: Weight | None = None
    parts: dict[str, Weight] | None = None
    partial: bool = False
    sha256: Annotated[str, Within(64, 64)] | None = None


@dataclass(frozen=True, kw_only=True)
class EmbeddingFile(Record):
    """A textual inversion file: its path, its hash and, to replace the name in the file, a token."""

    file: Annotated[str, Within(1, 4096)]
    token: Annotated[str, Within(1, 100)] | None = None
    sha256: Annotated[str, Within(64, 64)] | None = None


Framed = Annotated[Framing, "the fields of a Framing"]
Noised = Annotated[Noise, "the fields of a Noise"]
Interval = Annotated[GuidanceInterval, "the fields of a GuidanceInterval"]
Reweighted = Annotated[FreeU, "the fields of a FreeU"]
Adapters = Annotated[tuple[Annotated[AdapterFile, "fields of an AdapterFile"], ...], Within(0, 1000)]
Embeddings = Annotated[tuple[Annotated[EmbeddingFile, "fields of an EmbeddingFile"], ...], Within(0, 1000)]
