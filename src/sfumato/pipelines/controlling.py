"""A request's controls: loading and caching control networks, and preparing control images."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from sfumato.checkpoints.control_file import control_class, open_control_file
from sfumato.checkpoints.locate import locate_folder
from sfumato.checkpoints.locate_file import is_single_file
from sfumato.checkpoints.weights import find_weights
from sfumato.configs import CLIPVisionConfig, parse
from sfumato.errors import UsageError
from sfumato.files import expanded, file_hash, read_json
from sfumato.images import open_image
from sfumato.models import ControlNetModel, ControlNetUnionModel, T2IAdapter
from sfumato.models.base import select_model_files
from sfumato.pipelines.fingerprint import fingerprint
from sfumato.pipelines.parts import check_control
from sfumato.pipelines.residuals import steered_by, united
from sfumato.pipelines.source import OneNetwork, stored_size
from sfumato.pipelines.vaes import with_vae_size
from sfumato.preprocess import control_image, control_pixels
from sfumato.request import MODE_OF, MODES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

    from sfumato.pipelines.parts import Parts
    from sfumato.pipelines.place import Place
    from sfumato.pipelines.residuals import Steered
    from sfumato.request import Control, GenerateRequest
    from sfumato.runtime.choices import Sizes

__all__ = ["open_control", "steering", "with_networks", "with_sizes"]

CLASSES: dict[str, Any] = {cls.__name__: cls for cls in (ControlNetModel, ControlNetUnionModel, T2IAdapter)}


def open_control(name: str, *, local_files_only: bool = True, **hub: Any) -> OneNetwork:
    """Find a control network by folder, file or hub id. Reads no weights, and by default downloads nothing.

    Raises `CheckpointError` if it is not a control network, with a description of what it is instead.
    """
    hub = {"local_files_only": local_files_only, **hub}
    if is_single_file(name):
        file = open_control_file(name, **hub)
        return OneNetwork(file.path, CLASSES[control_class(file)], file)

    def select(names: Sequence[str], strict: bool) -> list[str]:
        return select_model_files(names, "", ControlNetModel.weights_name, strict=strict)

    folder = locate_folder(name, select, **hub)
    give = "give the folder of a ControlNet"
    return OneNetwork.in_folder(folder, CLASSES, name, "a ControlNet", whole=give, other=give)


def with_sizes(sizes: Sizes, request: GenerateRequest) -> Sizes:
    """Add the sizes of a request's control networks and image encoders to a checkpoint's, and those of its VAE."""
    sizes = with_vae_size(sizes, request.vae)
    sources = [open_control(name) for name in dict.fromkeys(control.model for control in request.controls)]
    unet = sum((source.size for source in sources), sizes.unet)
    configs = tuple(source.config for source in sources)
    sizes = dataclasses.replace(sizes, unet=unet, control_configs=configs) if sources else sizes
    folders = [expanded(prompt.encoder) for prompt in request.image_prompts]
    seen = tuple(parse(CLIPVisionConfig, read_json(one / "config.json"), one)[0] for one in folders)
    text = sum((stored_size(find_weights(one, "model")) for one in dict.fromkeys(folders)), sizes.text_encoder)
    return dataclasses.replace(sizes, text_encoder=text, vision_configs=(*sizes.vision_configs, *seen))


def with_networks(parts: Parts, place: Place, controls: Sequence[Control]) -> Parts:
    """Add the control networks, one for each control, to the parts. They stay loaded for the next request.

    Raises `CheckpointError` if a file is not a control network, and `UsageError` if it is made for another family or
    its weights differ from the recipe's.
    """
    if not (controls or parts.controls or place.kept):
        return parts
    kept: dict[Any, Any] = {}
    every = []
    for control in controls:
        source = open_control(control.model)
        every.append(source.place)
        key = (source.place, source.place.stat().st_mtime_ns, parts.unet.dtype)
        if key not in kept:
            network = place.kept.get(key) or source.load(parts.unet.dtype)
            check_control(parts.unet, network)
            if place.home is None and network.device.type != "meta":
                network.to(parts.unet.device)
            kept[key] = network
        if control.weights not in (None, fingerprint(kept[key])):
            raise UsageError(f"the weights of {control.model} differ from the recipe's; restore the original file")
    place.kept = kept
    networks = {key[0]: network for key, network in kept.items()}
    return dataclasses.replace(parts, controlnet=None, adapter=None, controls=tuple(networks[one] for one in every))


def steering(
    parts: Parts, controls: Sequence[Control], size: tuple[int, int]
) -> tuple[tuple[Steered, ...], tuple[Control, ...], list[Image], list[str]]:
    """Prepare each network for images of `size` (width, height), in the order of `Parts.controls`.

    Also returns the controls with hashes of their files, the preprocessed control images, and a note for each image
    that was cropped, padded or stretched. Raises `UsageError`.
    """
    steered, told, pictures, notes = [], [], [], []
    for control, network in zip(controls, parts.controls, strict=True):
        sha256 = file_hash(expanded(control.image), None) if expanded(control.image).is_file() else None
        if control.sha256 not in (None, sha256):
            raise UsageError(f"{control.image} is not the image that the recipe was made with; restore it")
        picture, note = control_image(open_image(control.image), size, control.fit, control.preprocessor)
        notes += [f"the control image {control.image} of {note}"] if note else []
        pictures.append(picture)
        told.append(control.replace(sha256=sha256, weights=fingerprint(network)))
        how: dict[str, Any] = {name: getattr(control, name) for name in ("scale", "start", "end")}
        how["layers"] = control.layers or ()
        how["guess"] = control.guess or getattr(network.config, "global_pool_conditions", False)
        if isinstance(network, ControlNetUnionModel):
            how["modes"] = (_mode(control, network.config.num_control_type),)
        one = steered_by(network, control_pixels(picture), **how)
        if control.layers is not None and len(control.layers) != one.count:
            raise UsageError(f"got {len(control.layers)} scales for the network's {one.count} layers; give one each")
        steered.append(one)
    return united(steered), tuple(told), pictures, notes


def _mode(control: Control, count: int) -> int:
    """Return the number of a control image's kind in a ControlNet Union."""
    kind = control.mode or MODE_OF.get(control.preprocessor)
    if kind is None or MODES.index(kind) >= count:
        raise UsageError(
            f"{control.model} reads {', '.join(MODES[:count])}; set the control's mode to the kind of {control.image}"
        )
    return MODES.index(kind)
