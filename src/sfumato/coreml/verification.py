"""Proving converted models right: against the checkpoint they were made from, on any machine.

Core ML computes on Apple's devices only, but what a package says is an exact program, so the portable runtime can be
asked. Three things are proved of each network: that its graph is the source's, by running it in float32 on the weights
it ships (100 dB leave no room for a wrong operation); that the precision it ships suffices; and, where weights have
palettes, that looking them up gives the very numbers of plain weights. Then a picture is drawn by both.

What this cannot show is how an Apple device rounds: the Neural Engine and GPUs add up in their own order.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sfumato.coreml.chunk import join
from sfumato.coreml.conversion import ConversionOptions, build
from sfumato.coreml.departure import departure
from sfumato.coreml.formats import read_model
from sfumato.coreml.layout import REQUIRED, find_models
from sfumato.coreml.measure import decibels
from sfumato.coreml.palettize import decompress
from sfumato.coreml.probes import PROMPT, answer, probes, rounded_to_float16
from sfumato.coreml.program import Model, TensorType, Value, constant
from sfumato.coreml.runtime import Predictor
from sfumato.coreml.source import open_source
from sfumato.errors import CheckpointError, DownloadError, UsageError
from sfumato.images import psnr
from sfumato.request import GenerateRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from sfumato.coreml.layout import Models
    from sfumato.coreml.probes import Probe
    from sfumato.coreml.program import Operation
    from sfumato.coreml.source import Source

__all__ = ["Check", "Verification", "prove", "verify"]

log = logging.getLogger("sfumato")

# One negated weight tensor can leave 38 dB (docs/log.md), so Apple's gate of 35 proves little; in float32 a right graph
# reaches 110 and more.
GRAPH_DB = 100.0
# What float16 leaves of a right network.
SHIPPED_DB = 55.0
# Graphs of other converters have their constants in float16 too, such as the scale of attention.
FOREIGN_GRAPH_DB = 60.0
PICTURE_DB = 30.0
PICTURE_SEED = 7
# Steps of the picture that is compared, where the checkpoint asks for none: enough to show a fault, few enough to wait.
PICTURE_STEPS = 4


@dataclass(frozen=True)
class Check:
    """One comparison: the part, what was compared, the agreement in dB (infinite if equal), and what is needed.

    needed is None where the number is only reported; `hint` says where the two part, for a check that failed.
    """

    part: str
    what: str
    db: float
    needed: float | None
    hint: str = ""

    @property
    def passed(self) -> bool:
        """Whether it is as good as needed."""
        return self.needed is None or self.db >= self.needed


@dataclass(frozen=True)
class Verification:
    """All comparisons of a folder, and what they were made against."""

    folder: Path
    source: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every one is as good as needed."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """For programs: as JSON has no infinity, the agreement of equal numbers is None."""
        checks = [
            dataclasses.asdict(check)
            | {"passed": check.passed, "equal": check.db == math.inf}
            | {key: None if math.isinf(getattr(check, key) or 0) else getattr(check, key) for key in ("db", "needed")}
            for check in self.checks
        ]
        return {"folder": str(self.folder), "against": self.source, "passed": self.passed, "checks": checks}


def verify(
    folder: Path,
    against: Source | None = None,
    *,
    parts: tuple[str, ...] | None = None,
    picture: bool = True,
    steps: int | None = None,
    on_part: Callable[[str], None] | None = None,
) -> Verification:
    """Prove the models in a folder against a checkpoint: the one given, or the one they name as their source.

    parts: those to look at, all that are there if None; picture: whether to draw one with both, in `steps` steps.
    `on_part` is told each part before its work. Raises `CheckpointError` if models are damaged or none of this
    checkpoint, `UsageError` if they name no source and none is given.
    """
    if steps is not None:
        GenerateRequest(prompt=PROMPT, steps=steps)  # refused here, and not after all other proofs
    models = find_models(folder, required=parts or ())
    for path, trouble in models.unread.items():
        raise CheckpointError(f"{path.name} cannot be verified: {trouble}")
    source = against or _named_source(models)
    missing = [part for part in REQUIRED if not models.paths(part)]
    if picture and missing:
        log.warning("no picture is compared, as %s has no %s", models.folder, " and no ".join(missing))
        picture = False
    checks: list[Check] = []
    for part in parts or models.parts:
        _tell(on_part, part)
        try:
            checks += prove(part, [read_model(path) for path in models.paths(part)], source)
        except CheckpointError as error:
            raise CheckpointError(f"{models.folder}, {part}: {error}") from error
        gc.collect()  # a network's modules hold each other, and the next one needs their room
    if picture:
        _tell(on_part, "picture")
        palettes = any(_has_palettes(read_model(path)) for paths in models.parts.values() for path in paths)
        checks.append(_compare_pictures(folder, source, steps, needed=None if palettes else PICTURE_DB))
    return Verification(folder, source.name, tuple(checks))


def prove(part: str, chunks: list[Model], source: Source) -> Iterator[Check]:
    """The comparisons of one part, whole or in chunks."""
    ours = all("sfumato.part" in one.metadata for one in chunks)
    palettes = any(_has_palettes(one) for one in chunks)
    shipped = _whole(chunks)
    tried = probes(part, shipped.interface, source)
    network = source.load(part, torch.float32)
    expected = [answer(part, network, probe) for probe in tried]
    exact = [answer(part, network, probe) for probe in tried] if rounded_to_float16(network) else expected
    weights = {name.replace(".", "_"): tensor for name, tensor in network.state_dict().items()} if palettes else {}
    del network
    if not palettes or ours:
        plain = Predictor(_whole([_with_weights(one, weights) for one in chunks]), precision="float32")
        needed = GRAPH_DB if ours else FOREIGN_GRAPH_DB
        check, probe = _compare(part, "graph in float32", plain, tried, exact, needed)
        yield check if check.passed else _located(check, plain, _rebuilt(part, chunks[0], source), probe)
        del plain
    del weights
    # Every result rounded as the program says, so nothing fused: what overflows between two operations must show.
    typed = Predictor(shipped, fuse=False)
    check, probe = _compare(part, "as shipped", typed, tried, expected, None if palettes else SHIPPED_DB)
    yield check if check.passed else _located(check, typed, Predictor(shipped, precision="float32"), probe)
    if palettes:
        unpacked = Predictor(_whole([decompress(one) for one in chunks]), fuse=False)
        same = [unpacked.run(probe) for probe in tried]
        check, probe = _compare(part, "palettes, unpacked", typed, tried, same, math.inf)
        yield check if check.passed else _located(check, typed, unpacked, probe)


def _compare(
    part: str,
    what: str,
    predictor: Predictor,
    tried: list[Probe],
    expected: list[dict[str, Tensor]],
    needed: float | None,
) -> tuple[Check, Probe]:
    """The least agreement over all probes and outputs, and the probe that has it."""
    worst = (math.inf, tried[0])
    for probe, answers in zip(tried, expected, strict=True):
        outputs = predictor.run(probe)
        missing = answers.keys() - outputs.keys()
        if missing:
            raise CheckpointError(f"the {part} has no output {missing.pop()!r}; it gives {', '.join(outputs)}")
        for name, wanted in answers.items():
            if outputs[name].numel() != wanted.numel():
                raise CheckpointError(
                    f"the {part} gives {name!r} in the shape {tuple(outputs[name].shape)} and the checkpoint in "
                    f"{tuple(wanted.shape)}; name the one that it was made from: --against <folder or id>"
                )
        agreement = min(decibels(outputs[name].reshape(wanted.shape), wanted) for name, wanted in answers.items())
        worst = min(worst, (agreement, probe), key=lambda pair: pair[0])
    return Check(part, what, worst[0], needed), worst[1]


def _located(check: Check, suspect: Predictor, reference: Predictor | None, probe: Probe) -> Check:
    return check if reference is None else dataclasses.replace(check, hint=departure(suspect, reference, probe))


def _rebuilt(part: str, shipped: Model, source: Source) -> Predictor | None:
    """The part as this converter makes it of the source today, in float32; None for what others converted."""
    if "sfumato.part" not in shipped.metadata:
        return None
    sides = {feature.name: feature.type.shape for feature in shipped.interface.inputs}
    options: dict[str, Any] = {}
    if part == "unet":
        batch, _, height, width = sides["sample"]
        options = {"attention": shipped.metadata["sfumato.attention"], "batch": batch, "height": height, "width": width}
    elif part != "text_encoder":
        factor = source.sizes.vae_config.scale_factor if part == "vae_encoder" else 1
        _, _, height, width = sides["x" if part == "vae_encoder" else "z"]
        options = {"height": (height or 0) // factor, "width": (width or 0) // factor}
    return Predictor(build(source, part, ConversionOptions(**options)), precision="float32")


def _compare_pictures(folder: Path, source: Source, steps: int | None, needed: float | None) -> Check:
    """One picture by the source in float32, and one by the models as shipped."""
    from sfumato.coreml.pipeline import load_pipeline
    from sfumato.pipelines import DiffusionPipeline

    # What the models do not say of themselves, the checkpoint does.
    about = str(source.folder)
    converted = load_pipeline(folder, compute_unit="CPU_ONLY", model_version=about, portable=True, precision="typed")
    settings: dict[str, Any] = {"steps": PICTURE_STEPS} | source.settings | ({} if steps is None else {"steps": steps})
    width, height = converted.size_of(GenerateRequest(prompt=PROMPT))
    request = GenerateRequest(prompt=PROMPT, seed=PICTURE_SEED, width=width, height=height, **settings)
    got = converted.generate(request).images[0]
    del converted
    original = DiffusionPipeline.from_pretrained(
        source.folder, torch_dtype=torch.float32, variant=source.variant, use_safetensors=source.use_safetensors
    )
    return Check(
        "picture", f"{request.steps} steps, as shipped", psnr(got, original.generate(request).images[0]), needed
    )


def _named_source(models: Models) -> Source:
    """The checkpoint that the models say they were made from, if it is here."""
    metadata = read_model(next(iter(models.parts.values()))[0]).metadata
    name, expected = metadata.get("sfumato.source"), metadata.get("sfumato.source_hash")
    if name is None:
        raise UsageError(
            "these models do not say what they were made from; name the checkpoint: --against <folder or id>"
        )
    try:
        source = open_source(name, local_files_only=True)
    except (CheckpointError, DownloadError) as error:
        raise UsageError(
            f"these models were made from {name}, which is not here ({error}); name the checkpoint: --against <folder>"
        ) from error
    if source.hash != expected:
        raise CheckpointError(
            f"{name} has other weights than the checkpoint that these models were made from; convert it again, or name "
            "the right one: --against <folder>"
        )
    return source


def _whole(chunks: list[Model]) -> Model:
    return chunks[0] if len(chunks) == 1 else join(chunks)


def _has_palettes(model: Model) -> bool:
    return any(one.type.startswith("constexpr_") for function in model.functions for one in function.operations)


def _with_weights(model: Model, weights: Mapping[str, Tensor]) -> Model:
    """The model with the source's own weights, in float16, where it has palettes."""
    return model.with_functions(
        lambda function: dataclasses.replace(
            function, operations=tuple(_with_weight(operation, weights) for operation in function.operations)
        )
    )


def _with_weight(operation: Operation, weights: Mapping[str, Tensor]) -> Operation:
    if not operation.type.startswith("constexpr_"):
        return operation
    name, sides = operation.outputs[0].name, operation.outputs[0].type.shape
    if name not in weights:
        raise CheckpointError(f"the compressed weight {name!r} is none of the source's; is it another checkpoint?")
    numbers = weights[name].half().reshape([side or 0 for side in sides]).numpy()
    return constant(name, Value(TensorType("fp16", sides), numbers))


def _tell(on_part: Callable[[str], None] | None, part: str) -> None:
    if on_part is not None:
        on_part(part)
