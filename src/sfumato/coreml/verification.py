"""Verifies converted models against their checkpoint, on any machine.

Core ML only runs on Apple's devices, but a package is an exact program, which the portable runtime can run. Three
things are verified for each network: its weights equal the source's, rounded to float16 or as close as their palettes
allow; its graph equals the source's, when run in float32 with the source's own weights (100 dB rule out a wrong
operation); and its precision is sufficient. Then both generate an image.

Rounding on Apple devices cannot be checked here, because the Neural Engine and GPUs sum in a different order.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sfumato.coreml.chunk import join
from sfumato.coreml.conversion import ConversionOptions, build
from sfumato.coreml.departure import departure
from sfumato.coreml.formats import read_model
from sfumato.coreml.layout import REQUIRED, find_models
from sfumato.coreml.matching import FREQUENCIES, Weights, is_compressed
from sfumato.coreml.measure import decibels
from sfumato.coreml.probes import PROMPT, answer, probes
from sfumato.coreml.program import Model
from sfumato.coreml.runtime import Predictor
from sfumato.coreml.source import open_source
from sfumato.errors import CheckpointError, DownloadError, UsageError
from sfumato.images import psnr
from sfumato.request import GenerateRequest
from sfumato.runtime.device import release_memory, reused_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from sfumato.coreml.matching import Matches
    from sfumato.coreml.probes import Probe
    from sfumato.coreml.program import Operation
    from sfumato.coreml.source import Source

__all__ = ["Check", "Verification", "prove", "verify"]

log = logging.getLogger("sfumato")

# A sign error in one weight tensor can leave 38 dB (docs/log.md), so Apple's threshold of 35 proves little; in float32
# a correct graph reaches 110 and more.
GRAPH_DB = 100.0
# What a correct network keeps in float16.
SHIPPED_DB = 55.0
# Other converters store all constants of the graph in float16, such as the scale of attention.
FOREIGN_GRAPH_DB = 60.0
PICTURE_DB = 30.0
PICTURE_SEED = 7
# Steps of the compared image, if the checkpoint recommends none: enough to show an error, few enough to wait for.
PICTURE_STEPS = 4
# Sines of a timestep: in float16, as other converters write them, angles are off by up to a third of a radian.
WAVES = ("sin", "cos")


@dataclass(frozen=True)
class Check:
    """One comparison: the part, what was compared, the agreement in dB (infinite if equal), and what is needed.

    needed is None if the value is only reported, though it must be finite; `hint` says where a failed comparison
    diverges. undecided: a failure does not prove the model wrong, because something in it could not be compared with
    the source.
    """

    part: str
    what: str
    db: float
    needed: float | None
    hint: str = ""
    undecided: bool = False

    @property
    def passed(self) -> bool:
        """Whether it is as good as needed."""
        return self.db > -math.inf and (self.needed is None or self.db >= self.needed)

    @property
    def verdict(self) -> str:
        """One of "ok", "reported", "WRONG" or "not proved"."""
        if self.passed:
            return "reported" if self.needed is None else "ok"
        return "not proved" if self.undecided else "WRONG"


@dataclass(frozen=True)
class Verification:
    """All comparisons of a folder's models with their source."""

    folder: Path
    source: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether all comparisons passed."""
        return all(check.passed for check in self.checks)

    @property
    def wrong(self) -> bool:
        """Whether any comparison shows that the models are not the checkpoint's."""
        return any(check.verdict == "WRONG" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-compatible dictionary; as JSON has no infinity, the dB of equal values are None."""
        checks = [
            dataclasses.asdict(check)
            | {"passed": check.passed, "equal": check.db == math.inf, "verdict": check.verdict}
            | {key: None if math.isinf(getattr(check, key) or 0) else getattr(check, key) for key in ("db", "needed")}
            for check in self.checks
        ]
        verdict = "ok" if self.passed else "WRONG" if self.wrong else "not proved"
        told = {"folder": str(self.folder), "against": self.source, "passed": self.passed, "verdict": verdict}
        return told | {"checks": checks}


def verify(
    folder: Path,
    against: Source | None = None,
    *,
    parts: tuple[str, ...] | None = None,
    picture: bool = True,
    steps: int | None = None,
    on_part: Callable[[str], None] | None = None,
) -> Verification:
    """Verify the models in a folder against a checkpoint: the given one, or the one they name as their source.

    parts: those to verify, all if None; picture: whether to generate an image with both, in `steps` steps. `on_part` is
    called with each part before its verification. Raises `CheckpointError` if models are damaged or belong to another
    checkpoint, and `UsageError` if they name no source and none is given.
    """
    if steps is not None:
        GenerateRequest(prompt=PROMPT, steps=steps)  # fail now rather than after all other checks
    models = find_models(folder, required=parts or ())
    for path, trouble in models.unread.items():
        raise CheckpointError(f"{path.name} cannot be verified: {trouble}")
    read = {part: [read_model(path) for path in paths] for part, paths in models.parts.items()}
    source = against or _named_source(next(iter(read.values()))[0])
    missing = [part for part in REQUIRED if not models.paths(part)]
    if picture and missing:
        log.warning("no image is compared, because %s has no %s", models.folder, " and no ".join(missing))
        picture = False
    checks: list[Check] = []
    with reused_memory():
        for part in parts or models.parts:
            _tell(on_part, part)
            try:
                checks += prove(part, read[part], source)
            except CheckpointError as error:
                raise CheckpointError(f"{models.folder}, {part}: {error}") from error
        if picture:
            _tell(on_part, "picture")
            compressed = any(_is_compressed(one) for chunks in read.values() for one in chunks)
            checks.append(_compare_pictures(folder, source, steps, needed=None if compressed else PICTURE_DB))
    return Verification(folder, source.name, tuple(checks))


def prove(part: str, chunks: list[Model], source: Source) -> Iterator[Check]:
    """Yield the comparisons of one part, whole or in chunks."""
    ours = all("sfumato.part" in one.metadata for one in chunks)
    shipped = _whole(chunks)
    tried = probes(part, shipped.interface, source)
    expected = _answers(part, tried, source)
    matches = Weights(partial(source.load, part)).find(chunks, named=ours)
    yield from _weights(part, matches, ours=ours)
    plain = Predictor(_whole([matches.put_into(one) for one in chunks]), precision="float32")
    check, probe = _compare(part, "graph in float32", plain, tried, expected, GRAPH_DB if ours else FOREIGN_GRAPH_DB)
    yield _judged(check, plain, lambda: _rebuilt(part, chunks[0], source), probe, matches)
    del plain
    yield from _precision(part, chunks, matches, tried, expected)


def _precision(
    part: str, chunks: list[Model], matches: Matches, tried: list[Probe], expected: list[dict[str, Tensor]]
) -> Iterator[Check]:
    """Measure rounding to float16 and, separately, what other converters round and what compression loses."""
    shipped = _whole(chunks)
    apart = {"uncompressed": _is_compressed(shipped), "sines in float32": _rounds_waves(shipped)}
    alone = not any(apart.values())
    # Round every result as the program does, without fusion, so that overflow between operations is detected.
    typed = Predictor(shipped, fuse=False)
    count, needed = (len(tried), SHIPPED_DB) if alone else (1, None)
    check, probe = _compare(part, "as shipped", typed, tried[:count], expected, needed, watch=True)
    yield _judged(check, typed, lambda: Predictor(shipped, precision="float32"), probe)
    if alone:
        return
    del typed
    keys = None if apart["uncompressed"] else {FREQUENCIES}
    rest = _whole([matches.put_into(one, "fp16", keys=keys) for one in chunks])
    typed = Predictor(rest, fuse=False, unrounded=WAVES)
    what = ", ".join(["as shipped", *(word for word, is_so in apart.items() if is_so)])
    check, probe = _compare(part, what, typed, tried, expected, SHIPPED_DB, watch=True)
    yield _judged(check, typed, lambda: Predictor(rest, precision="float32"), probe, matches)


def _answers(part: str, tried: list[Probe], source: Source) -> list[dict[str, Tensor]]:
    """Return the source's float32 outputs for all probes."""
    network = source.load(part, torch.float32)
    found = [answer(part, network, probe) for probe in tried]
    del network
    gc.collect()  # modules are in reference cycles, which keep the weights
    release_memory(torch.device("cpu"))
    return found


def _weights(part: str, matches: Matches, *, ours: bool) -> Iterator[Check]:
    """Check that the constants are the source's weights; for other converters, only the compressed ones."""
    worst = matches.worst(compressed=False)
    if ours and worst is not None:
        hint = "" if worst.near else f"{worst.name!r} is not the checkpoint's {worst.key}, rounded"
        yield Check(part, "weights", worst.db, math.inf, hint)
    worst = matches.worst(compressed=True)
    if worst is not None:
        hint = f"the checkpoint's closest weight to {worst.name!r} is {worst.key}, which is not close enough"
        yield Check(part, "compressed weights", worst.db, worst.needed, "" if worst.near else hint)


def _compare(
    part: str,
    what: str,
    predictor: Predictor,
    tried: list[Probe],
    expected: list[dict[str, Tensor]],
    needed: float | None,
    *,
    watch: bool = False,
) -> tuple[Check, Probe]:
    """Return the least agreement over all probes and outputs, and the probe that has it.

    watch: whether NaN in any operation is a failure, even if later operations hide it.
    """
    worst = (math.inf, tried[0])
    lost = _Lost() if watch else None
    for probe, wanted in zip(tried, expected, strict=False):
        outputs = predictor.run(probe, lost)
        _check_outputs(part, outputs, wanted)
        agreement = min(decibels(outputs[name].reshape(one.shape), one) for name, one in wanted.items())
        worst = min(worst, (agreement, probe), key=lambda pair: pair[0])
    if lost is not None and lost.where and worst[0] > -math.inf:
        return Check(part, what, -math.inf, needed, lost.where), worst[1]
    return Check(part, what, worst[0], needed), worst[1]


def _check_outputs(part: str, outputs: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name in wanted:
        if name not in outputs:
            raise CheckpointError(f"the {part} has no output {name!r}; it has {', '.join(outputs)}")
        if outputs[name].numel() != wanted[name].numel():
            raise CheckpointError(
                f"the {part} returns {name!r} with shape {tuple(outputs[name].shape)}, but the checkpoint with "
                f"{tuple(wanted[name].shape)}; give the one it was made from: --against <folder or id>"
            )


class _Lost:
    """Looks for the first operation whose result has NaN."""

    where = ""

    def __call__(self, operation: Operation, place: int, values: tuple[Tensor, ...]) -> None:
        if self.where:
            return
        for value in values:
            # The sum is a cheap test for no NaN; infinities of both signs give a false alarm, hence the second test.
            if value.is_floating_point() and bool(value.sum().isnan()) and bool(value.isnan().any()):
                name = operation.outputs[0].name
                self.where = f"operation {place} {operation.type!r} ({name}) returns NaN, which later operations hide"


def _judged(
    check: Check,
    suspect: Predictor,
    reference: Callable[[], Predictor | None],
    probe: Probe,
    matches: Matches | None = None,
) -> Check:
    """Return the check; if it failed, with a hint from comparing `suspect` to what `reference` returns."""
    if check.passed or check.hint:
        return check
    if matches is not None and matches.unknown:
        names = ", ".join(matches.unknown[:3])
        hint = f"the checkpoint has no weights of the shape of {names}, so what they hold cannot be compared"
        return dataclasses.replace(check, hint=hint, undecided=True)
    other = reference()
    return check if other is None else dataclasses.replace(check, hint=departure(suspect, other, probe))


def _rebuilt(part: str, shipped: Model, source: Source) -> Predictor | None:
    """Return the part as converted from the source now, in float32; None for models of other converters."""
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
    """Compare an image by the source in float32 with one by the models as shipped."""
    from sfumato.coreml.pipeline import load_pipeline
    from sfumato.pipelines import DiffusionPipeline

    # The checkpoint provides what the models' metadata lacks.
    about = str(source.checkpoint.path)
    converted = load_pipeline(folder, compute_unit="CPU_ONLY", model_version=about, portable=True, precision="typed")
    settings: dict[str, Any] = {"steps": PICTURE_STEPS} | source.settings | ({} if steps is None else {"steps": steps})
    width, height = converted.size_of(GenerateRequest(prompt=PROMPT))
    request = GenerateRequest(prompt=PROMPT, seed=PICTURE_SEED, width=width, height=height, **settings)
    got = converted.generate(request).images[0]
    del converted
    original = DiffusionPipeline.from_source(source.checkpoint, torch.float32, {})
    drawn = original.generate(request.replace(adapters=source.adapters))
    return Check("picture", f"{request.steps} steps, as shipped", psnr(got, drawn.images[0]), needed)


def _named_source(model: Model) -> Source:
    """Return the checkpoint that a model names as its source, if it is on this machine."""
    metadata = model.metadata
    name, expected = metadata.get("sfumato.source"), metadata.get("sfumato.source_hash")
    if name is None:
        raise UsageError("these models do not name their checkpoint; give it with --against <folder or id>")
    try:
        source = open_source(name, local_files_only=True)
    except (CheckpointError, DownloadError) as error:
        raise UsageError(
            f"these models were made from {name}, which was not found ({error}); give its path with --against <folder>"
        ) from error
    if source.hash != expected:
        raise CheckpointError(
            f"{name} has other weights than the checkpoint these models were made from; convert it again, or give "
            "the right one: --against <folder>"
        )
    return source


def _whole(chunks: list[Model]) -> Model:
    return chunks[0] if len(chunks) == 1 else join(chunks)


def _is_compressed(model: Model) -> bool:
    return any(is_compressed(one) for function in model.functions for one in function.operations)


def _rounds_waves(model: Model) -> bool:
    """Return whether it has sines in float16, as Apple's converter uses for timesteps."""
    every = (one for function in model.functions for one in function.operations)
    return any(one.type in WAVES and one.outputs[0].type.dtype == "fp16" for one in every)


def _tell(on_part: Callable[[str], None] | None, part: str) -> None:
    if on_part is not None:
        on_part(part)
