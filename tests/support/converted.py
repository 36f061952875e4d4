"""Converted models of tiny checkpoints: in files, or as networks that compute what they were made from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sfumato.coreml.backends import Chain, Link
from sfumato.coreml.networks import ConvertedAutoencoder, ConvertedTextEncoder, ConvertedUNet
from sfumato.coreml.pipeline import CoreMLPipeline
from sfumato.coreml.program import Feature, Interface, TensorType
from sfumato.coreml.roles import PARTS
from sfumato.coreml.source import Source, open_source


def write_converted(
    checkpoint: Path,
    target: Path,
    *,
    dtype: str = "fp32",
    kind: str = "packages",
    parts: tuple[str, ...] = PARTS,
    chunks: int = 1,
    batch: int = 2,
    described: bool = True,
    tokenizer: bool = True,
    changes: dict[str, str] | None = None,
) -> Path:
    """Convert a checkpoint part by part into a folder.

    described: with the metadata that our own conversion writes; published models have none. tokenizer: with its files
    beside the models. changes: metadata to write in place of ours.
    """
    from sfumato.coreml import conversion
    from sfumato.coreml.chunk import chunk
    from sfumato.coreml.formats import write_compiled, write_package
    from sfumato.coreml.layout import compiled_names, package_names

    source = open_source(checkpoint)
    options = conversion.ConversionOptions(batch=batch, attention="original")
    target.mkdir(parents=True, exist_ok=True)
    for part in parts:
        model = model_of(source, part, dtype=dtype, batch=batch)
        metadata = conversion.metadata_for(source, part, options) if described else {}
        model = dataclasses.replace(model, metadata=metadata | (changes or {}))
        pieces = chunk(model, chunks) if part == "unet" and chunks > 1 else [model]
        packages, compiled = package_names("tiny", part, len(pieces)), compiled_names(part, len(pieces))
        for piece, package, folder in zip(pieces, packages, compiled, strict=True):
            if kind == "packages":
                write_package(piece, target / package)
            else:
                write_compiled(piece, target / folder)
    if tokenizer:
        for name in ("vocab.json", "merges.txt"):
            (target / name).write_bytes((checkpoint / "tokenizer" / name).read_bytes())
    return target


def model_of(source: Source, part: str, *, dtype: str = "fp32", batch: int = 2) -> Any:
    """The program of one part, in the checkpoint's own size."""
    from sfumato.coreml.converter import text_encoder, unet, vae_decoder, vae_encoder

    network: Any = source.load(part, torch.float32)
    if part == "text_encoder":
        return text_encoder(network, dtype=dtype)
    own = source.config("unet")["sample_size"]
    height, width = (own, own) if isinstance(own, int) else own
    if part == "unet":
        tokens = source.config("text_encoder")["max_position_embeddings"]
        return unet(network, height=height, width=width, tokens=tokens, batch=batch, dtype=dtype)
    return {"vae_decoder": vae_decoder, "vae_encoder": vae_encoder}[part](
        network, height=height, width=width, dtype=dtype
    )


def feature(name: str, shape: tuple[int | None, ...], dtype: str = "fp32") -> Feature:
    return Feature(name, TensorType(dtype, shape))


class Stub:
    """A backend made of a function from and to arrays by name; it checks shapes and types, and keeps what it was asked."""

    def __init__(self, inputs: list[Feature], outputs: list[Feature], compute: Any) -> None:
        self.interface = Interface(tuple(inputs), tuple(outputs))
        self.compute = compute
        self.asked: list[dict[str, np.ndarray]] = []

    def predict(self, inputs: Any) -> dict[str, np.ndarray]:
        words = {"fp32": np.float32, "fp16": np.float16}
        assert set(inputs) == {one.name for one in self.interface.inputs}
        for one in self.interface.inputs:
            assert inputs[one.name].shape == one.type.shape, one
            assert inputs[one.name].dtype == words[one.type.dtype], one
        self.asked.append(dict(inputs))
        return self.compute(**inputs)

    @property
    def chain(self) -> Chain:
        return Chain([Link(self.interface, lambda: self)])


class Stubs:
    """Backends that compute with the networks of a torch pipeline: what is asked and answered is what Core ML would be."""

    def __init__(self, pipe: Any, *, batch: int = 2, dtype: str = "fp32") -> None:
        self.pipe = pipe
        config, tokens = pipe.unet.config, pipe.tokenizer.model_max_length
        own, factor, channels = config.sample_size, pipe.vae.config.scale_factor, config.in_channels
        height, width = (own, own) if isinstance(own, int) else own
        wide = config.per_block("cross_attention_dim")[0]
        sample, picture = (batch, channels, height, width), (1, 3, height * factor, width * factor)
        states = feature("encoder_hidden_states", (batch, wide, 1, tokens), dtype)
        self.text = Stub(
            [feature("input_ids", (1, tokens))],
            [feature("last_hidden_state", (1, tokens, wide)), feature("pooled_outputs", (1, wide))],
            self._text,
        )
        self.unet = Stub(
            [feature("sample", sample, dtype), feature("timestep", (batch,), dtype), states],
            [feature("noise_pred", sample)],
            self._unet,
        )
        self.decoder = Stub([feature("z", (1, *sample[1:]), dtype)], [feature("image", picture)], self._decode)
        self.encoder = Stub(
            [feature("x", picture, dtype)], [feature("latent", (1, 2 * channels, height, width))], self._encode
        )

    def pipeline(self, *, encoder: bool = True) -> CoreMLPipeline:
        """A pipeline over them."""
        pipe, (_, _, height, width) = self.pipe, self.unet.interface.inputs[0].type.shape
        parts = {
            "text_encoder": ConvertedTextEncoder(pipe.text_encoder.config, self.text.chain),
            "unet": ConvertedUNet(pipe.unet.config.replace(sample_size=(height, width)), self.unet.chain),
            "vae": ConvertedAutoencoder(pipe.vae.config, self.decoder.chain, self.encoder.chain if encoder else None),
        }
        for name, network in parts.items():
            network.fingerprint = name
        made = CoreMLPipeline(**parts, tokenizer=pipe.tokenizer, scheduler=pipe.scheduler)
        made.set_progress_bar_config(disable=True)
        return made

    @torch.no_grad()
    def _text(self, input_ids: np.ndarray) -> dict[str, np.ndarray]:
        output = self.pipe.text_encoder(torch.from_numpy(input_ids).long())
        return {"last_hidden_state": output.last_hidden_state.numpy(), "pooled_outputs": output.pooler_output.numpy()}

    @torch.no_grad()
    def _unet(
        self, sample: np.ndarray, timestep: np.ndarray, encoder_hidden_states: np.ndarray
    ) -> dict[str, np.ndarray]:
        tensors = [torch.from_numpy(value).float() for value in (sample, timestep, encoder_hidden_states[:, :, 0])]
        return {"noise_pred": self.pipe.unet(tensors[0], tensors[1], tensors[2].transpose(1, 2)).sample.numpy()}

    @torch.no_grad()
    def _decode(self, z: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": self.pipe.vae.decode(torch.from_numpy(z).float()).sample.numpy()}

    @torch.no_grad()
    def _encode(self, x: np.ndarray) -> dict[str, np.ndarray]:
        return {"latent": self.pipe.vae.encode(torch.from_numpy(x).float()).latent_dist.parameters.numpy()}


def metadata_of(path: Path) -> dict[str, Any]:
    """What a package says of itself."""
    from sfumato.coreml.formats import read_model

    return {key: json.loads(text) if text[:1] in "{[" else text for key, text in read_model(path).metadata.items()}


__all__ = ["Stub", "Stubs", "feature", "metadata_of", "model_of", "write_converted"]
