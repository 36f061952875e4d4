"""The public pipelines."""

from sfumato.pipelines.loading import load
from sfumato.pipelines.pipeline import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from sfumato.pipelines.result import Result

__all__ = ["DiffusionPipeline", "Result", "StableDiffusionImg2ImgPipeline", "StableDiffusionPipeline", "load"]
