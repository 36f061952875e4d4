"""Builds ML Programs from networks, operation by operation: no tracing, and weights are read only when written."""

from sfumato.coreml.converter.attention import ATTENTIONS, attention_named
from sfumato.coreml.converter.targets import DEFAULT_TARGET, TARGETS, Target, target_named
from sfumato.coreml.converter.text_encoder import text_encoder
from sfumato.coreml.converter.unet import unet
from sfumato.coreml.converter.vae import vae_decoder, vae_encoder

__all__ = [
    "ATTENTIONS",
    "DEFAULT_TARGET",
    "TARGETS",
    "Target",
    "attention_named",
    "target_named",
    "text_encoder",
    "unet",
    "vae_decoder",
    "vae_encoder",
]
