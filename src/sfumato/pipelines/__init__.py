"""The public pipelines."""

from sfumato.pipelines.pipeline import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, load
from sfumato.pipelines.result import Result

__all__ = ["DiffusionPipeline", "Result", "StableDiffusionImg2ImgPipeline", "StableDiffusionPipeline", "load"]
