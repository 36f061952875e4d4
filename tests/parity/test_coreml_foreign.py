"""Proofs of packages that coremltools made: right ones pass, in every compression, and those of other weights do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.coreml.conversion import ConversionOptions, build
from sfumato.coreml.formats import read_model, write_package
from sfumato.coreml.source import open_source
from sfumato.coreml.verification import prove
from support.checkpoints import REAL, write_ours
from support.coremltools import import_coremltools, quiet

ct = import_coremltools()

# coremltools leaves its temporary folders to the garbage collector, and its modules warn of themselves.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(write_ours(tmp_path_factory.mktemp("real") / "real", REAL))


@pytest.fixture(scope="module")
def other(source, tmp_path_factory):
    """Another training of the same networks."""
    return open_source(write_ours(tmp_path_factory.mktemp("other") / "other", REAL, seed=7))


class AsApples(torch.nn.Module):
    """The reference library's U-Net with the inputs that Apple's converter gives it."""

    def __init__(self, folder: Path) -> None:
        import diffusers

        super().__init__()
        self.unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")

    def forward(self, sample, timestep, encoder_hidden_states):
        return self.unet(sample, timestep, encoder_hidden_states.squeeze(2).transpose(1, 2), return_dict=False)[0]


@pytest.fixture(scope="module")
def unet(source):
    """The U-Net by coremltools in float16, sines of timesteps and all."""
    names = {"sample": (2, 4, 8, 8), "timestep": (2,), "encoder_hidden_states": (2, 64, 1, 77)}
    with quiet():
        exported = torch.export.export(AsApples(source.checkpoint.path).eval(), tuple(map(torch.ones, names.values())))
        return ct.convert(
            exported.run_decompositions({}),
            inputs=[ct.TensorType(name, shape=shape, dtype=np.float16) for name, shape in names.items()],
            outputs=[ct.TensorType("noise_pred", dtype=np.float32)],
            minimum_deployment_target=ct.target.macOS13,
            skip_model_load=True,
        )


def compressed(model, how: str):
    """By coremltools: `6-bit`, `int8` or `sparse`."""
    optimize = ct.optimize.coreml
    with quiet():
        if how == "int8":
            config = optimize.OpLinearQuantizerConfig(mode="linear_symmetric")
            return optimize.linear_quantize_weights(model, optimize.OptimizationConfig(config))
        if how == "sparse":
            config = optimize.OpMagnitudePrunerConfig(target_sparsity=0.3)
            return optimize.prune_weights(model, optimize.OptimizationConfig(config))
        # Even steps are quickly made and the worst that six bits can be; k-means is compared with ours elsewhere.
        config = optimize.OpPalettizerConfig(mode="uniform", nbits=6)
        return optimize.palettize_weights(model, optimize.OptimizationConfig(config, op_type_configs={"gather": None}))


def checks(model, part: str, source, folder: Path):
    path = folder / "a.mlpackage"
    with quiet():
        model.save(str(path))
    return list(prove(part, [read_model(path)], source))


def test_sines_in_float16_are_what_others_graphs_cost_and_no_fault(unet, source, tmp_path):
    graph, shipped, apart = checks(unet, "unet", source, tmp_path)
    assert (graph.what, shipped.what, apart.what) == (
        "graph in float32", "as shipped", "as shipped, sines in float32",
    )  # fmt: skip
    # With the table of frequencies as it is before rounding, the graph is as good as ours.
    assert graph.db > 85
    assert shipped.db < 56
    assert (shipped.verdict, apart.verdict) == ("reported", "ok")
    assert apart.db > shipped.db + 5


@pytest.mark.parametrize("how", ["6-bit", "int8", "sparse"])
def test_compressed_packages_are_proved_and_those_of_another_checkpoint_are_not(unet, source, other, how, tmp_path):
    packed = compressed(unet, how)
    verdicts = {check.what: check.verdict for check in checks(packed, "unet", source, tmp_path)}
    last = "as shipped, uncompressed, sines in float32"
    assert verdicts == {
        "compressed weights": "ok", "graph in float32": "ok", "as shipped": "reported", last: "ok",
    }  # fmt: skip
    if how == "6-bit":
        verdicts = {check.what: check.verdict for check in checks(packed, "unet", other, tmp_path)}
        assert verdicts["compressed weights"] == verdicts["graph in float32"] == verdicts[last] == "WRONG"


def test_masks_and_statistics_that_others_compress_are_part_of_the_graph(source, other, tmp_path):
    """coremltools compresses whatever has more than 2,048 numbers, the causal mask too."""
    model = build(source, "text_encoder", ConversionOptions())
    write_package(model, tmp_path / "plain.mlpackage")
    packed = compressed(ct.models.MLModel(str(tmp_path / "plain.mlpackage"), skip_model_load=True), "6-bit")
    kinds = [one.type for one in read_saved(packed, tmp_path).program.functions["main"].operations if one.outputs[0].type.shape == (1, 1, 77, 77)]  # fmt: skip
    assert "constexpr_lut_to_dense" in kinds
    assert {check.verdict for check in checks(packed, "text_encoder", source, tmp_path)} == {"ok", "reported"}
    assert checks(packed, "text_encoder", other, tmp_path)[0].verdict == "WRONG"


def read_saved(model, folder: Path):
    with quiet():
        model.save(str(folder / "saved.mlpackage"))
    return read_model(folder / "saved.mlpackage")
