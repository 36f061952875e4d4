"""The CLIP text encoder as an ML Program."""

from __future__ import annotations

import numpy as np

from sfumato.coreml import program
from sfumato.coreml.converter.attention import attention_named
from sfumato.coreml.converter.builder import Builder
from sfumato.coreml.converter.emitter import Handle
from sfumato.coreml.converter.layers import Layers, parts
from sfumato.coreml.converter.targets import DEFAULT_TARGET, target_named
from sfumato.models.text_encoder import CLIPMLP, CLIPLayer, CLIPTextModel

__all__ = ["text_encoder"]

# Added to the scores of later tokens: low enough, but finite, so that the model can be palettized.
MASKED = -1e4


def text_encoder(model: CLIPTextModel, *, target: str = DEFAULT_TARGET, dtype: str = "fp16") -> program.Model:
    """Build the program of a text encoder.

    Input: input_ids (1, S) in float32, S the model's `max_position_embeddings`. Outputs, in float32: last_hidden_state
    (1, S, C), normalized, and pooled_outputs (1, C), its row at the end of the text. Raises `UsageError` for an unknown
    target or precision.
    """
    b = Builder(target_named(target), dtype)
    layers = Layers(b, model, attention_named("original"))
    length, text = model.config.max_position_embeddings, model.text_model
    given = b.input("input_ids", "fp32", (1, length), "The tokens of a prompt, padded to the full length")
    ids = b.cast(given, "int32")
    x = _embed(layers, model, ids)
    mask = np.triu(np.full((length, length), MASKED, np.float32), 1)
    for layer in parts(text.encoder.layers):
        x = _layer(layers, layer, x, mask)
    x = b.transpose(layers.layer_norm(text.final_layer_norm, x), (0, 3, 2, 1))
    last = b.squeeze(x, (2,))
    rows = b.stack([b.constant("row", [0]), _end_of_text(b, model, ids)], 1)
    b.result(last, "last_hidden_state", "The encoded prompt, token by token")
    b.result(b.gather_nd(last, rows), "pooled_outputs", "The encoded prompt at the end of the text")
    return b.model("Stable Diffusion: encodes the tokens of a prompt with CLIP")


def _embed(layers: Layers, model: CLIPTextModel, ids: Handle) -> Handle:
    """Embed ids (1, S) -> (1, C, 1, S)."""
    b, embeddings = layers.builder, model.text_model.embeddings
    with b.scope(layers.path(embeddings)):
        x = b.gather(layers.weight(embeddings.token_embedding, "weight"), ids, 0)
        x = b.add(x, layers.weight(embeddings.position_embedding, "weight"))
        return b.transpose(b.expand_dims(x, (2,)), (0, 3, 2, 1))


def _layer(layers: Layers, layer: CLIPLayer, x: Handle, mask: np.ndarray) -> Handle:
    """Apply a transformer layer to (1, C, 1, S)."""
    b, attention = layers.builder, layer.self_attn
    with b.scope(layers.path(layer)):
        h = layers.layer_norm(layer.layer_norm1, x)
        q, k, v = (layers.conv(projection, h) for projection in (attention.q_proj, attention.k_proj, attention.v_proj))
        with b.scope(layers.path(attention)):
            h = layers.attend(q, k, v, attention.heads, mask=mask)
        x = b.add(x, layers.conv(attention.out_proj, h))
        return b.add(x, _mlp(layers, layer.mlp, layers.layer_norm(layer.layer_norm2, x)))


def _mlp(layers: Layers, mlp: CLIPMLP, x: Handle) -> Handle:
    b = layers.builder
    x = layers.conv(mlp.fc1, x)
    with b.scope(layers.path(mlp)):
        x = b.mul(x, b.unary("sigmoid", b.scaled(x, 1.702))) if mlp.quick else b.gelu(x)
    return layers.conv(mlp.fc2, x)


def _end_of_text(b: Builder, model: CLIPTextModel, ids: Handle) -> Handle:
    """Return the index of the end of the text, (1,): the first end-of-text token.

    Texts are often padded with that same token, and MIL's argmax may return any of several equal maxima, so the tokens
    are weighted, the first one most.
    """
    eos = model.config.eos_token_id
    # Old configs have the incorrect id 2; for these, the end-of-text token is the largest id.
    ends = b.equal(ids, b.reduce_max(ids, (1,)) if eos in (None, 2) else eos)
    weights = np.arange(ids.shape[1], 0, -1, dtype=np.int32)[None]
    return b.reduce_argmax(b.mul(b.cast(ends, "int32"), weights), 1)
