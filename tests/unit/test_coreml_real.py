"""Core ML at CLIP's own vocabulary (49,408 words), its length (77) and heads as wide as in Stable Diffusion."""

from __future__ import annotations

import math

import pytest
import torch

from sfumato.coreml.conversion import ConversionOptions, build, convert
from sfumato.coreml.formats import read_model
from sfumato.coreml.palettize import weights_of
from sfumato.coreml.probes import PROMPT, probes
from sfumato.coreml.roles import PARTS
from sfumato.coreml.source import open_source
from sfumato.coreml.verification import verify
from support.checkpoints import REAL, write_ours

PALETTIZED = ("text_encoder", "unet")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(write_ours(tmp_path_factory.mktemp("real") / "real", REAL))


def test_token_ids_are_never_rounded(source):
    """float16 has no odd numbers above 2,048, and 49,407 would become a word that there is not."""
    interface = build(source, "text_encoder", ConversionOptions()).interface
    tried = probes("text_encoder", interface, source)
    for probe, text in zip(tried, (PROMPT, ""), strict=True):
        assert torch.equal(probe["input_ids"], source.tokenizer.fitted(text).input_ids)
    ids = tried[0]["input_ids"]
    assert {49406, 49407} < {*ids.flatten().tolist()}
    assert bool((ids.half().long() != ids).any())
    assert len({*ids.flatten().tolist()} & set(range(2049, 49406))) > 2


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "original"},
        {"attention": "split_einsum", "bits": 6, "chunks": 2},
        {"attention": "split_einsum_v2", "bits": 4, "chunks": 3, "target": "iOS18", "parts": PALETTIZED},
    ],
    ids=lambda options: options["attention"],
)
def test_every_part_is_converted_and_proved(source, options, tmp_path):
    options = ConversionOptions(**options)
    made = convert(source, tmp_path, options)
    assert {part.part: len(part.paths) for part in made.parts} == dict.fromkeys(options.parts, 1) | {
        "unet": options.chunks
    }
    proof = verify(tmp_path, steps=1, picture=options.parts == PARTS and not options.bits)
    assert proof.passed, proof.checks
    found = {(check.part, check.what): check.db for check in proof.checks}
    for part in options.parts:
        assert found[part, "weights"] == math.inf
        assert found[part, "graph in float32"] > 110
        assert ((part, "compressed weights") in found) == (part in PALETTIZED and options.bits is not None)


def test_the_mask_keeps_its_numbers(source, tmp_path):
    """77 × 77 numbers are more than a weight must have to be given a palette, and are none."""
    model = build(source, "text_encoder", ConversionOptions())
    names = {name.replace(".", "_") for name in source.load("text_encoder").state_dict()}
    assert {*weights_of(model)} < names
    convert(source, tmp_path, ConversionOptions(parts=("text_encoder",), bits=1))
    function = read_model(next(tmp_path.glob("*.mlpackage"))).program.functions["main"]
    (mask,) = (one for one in function.operations if one.outputs[0].type.shape == (1, 1, 77, 77) and not one.inputs)
    assert mask.type == "const"
    assert {*mask.attributes["val"].read().ravel().tolist()} == {0.0, -1e4}
