"""What a file is, from its header alone: every family at its real widths, what else files hold, and what users say."""

from __future__ import annotations

import json
import logging
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sfumato
from sfumato.checkpoints.detect import detect
from sfumato.checkpoints.geometry import unet_config
from sfumato.checkpoints.headers import Header, Stored, read_header
from sfumato.checkpoints.rules import OPEN_CLIP, unet_names, vae_names
from sfumato.checkpoints.write_file import original_state
from sfumato.configs import UNet2DConditionConfig, parse
from sfumato.errors import CheckpointError, UsageError
from sfumato.families import FAMILIES

LAID_OUT = [row for row in FAMILIES.values() if row.encoders and row.name != "x2-upscaler"]
# Files that only their names or what lies beside the weights tell from those of the same shapes.
FILES = {
    "sd-turbo": "sd_turbo",
    "sdxl-turbo": "sd_xl_turbo_1.0_fp16",
    "sdxl-lightning": "sdxl_lightning_4step",
    "hyper-sdxl": "Hyper-SDXL-4steps",
}
_made: dict[str, dict[str, Stored]] = {}


def stored(state: dict[str, torch.Tensor]) -> dict[str, Stored]:
    """In eight bits, of which no number is read."""
    return {name: Stored("F8_E5M2", tuple(tensor.shape), 0, tensor.numel()) for name, tensor in state.items()}


def whole(name: str) -> dict[str, Stored]:
    """Every tensor of a family's file at its real widths, none of them there."""
    if name not in _made:
        row = FAMILIES[name]
        with torch.device("meta"):
            state = original_state(sfumato.UNet2DConditionModel(**row.unet), "original", "model.diffusion_model.")
            state |= original_state(sfumato.AutoencoderKL(**row.vae), "original", "first_stage_model.")
            for index, one in enumerate(row.encoders):
                kind = sfumato.CLIPTextModelWithProjection if one.projected else sfumato.CLIPTextModel
                stage = f"conditioner.embedders.{index}." if row.sizes else "cond_stage_model."
                prefix = stage + ("model." if one.naming == "open_clip" else "transformer.")
                state |= original_state(kind(**one.config), one.naming, prefix)
        _made[name] = stored(state)
    return dict(_made[name])


def header(tensors, name: str = "file", **metadata: str) -> Header:
    return Header(Path(f"{name}.safetensors"), tensors, {f"modelspec.{key}": text for key, text in metadata.items()})


@pytest.mark.parametrize("row", LAID_OUT, ids=lambda row: row.name)
def test_every_family_at_its_real_widths(row):
    tensors = whole(row.name)
    tensors |= {marker: Stored("F8_E5M2", (4,)) for marker in row.markers}
    # What predicts velocity and is not told from its shapes says so in its metadata.
    metadata = {"prediction_type": "v"} if row.name == "sd21" else {}
    found = detect(header(tensors, FILES.get(row.name, "model"), **metadata))
    assert found.family.name == row.name
    assert found.missing == {}
    assert found.notes == ()
    assert found.reasons
    assert dict(found.scheduler) == row.scheduler
    assert found.steps == row.steps
    assert set(found.parts) == {"unet", "vae", *(one.role for one in row.encoders)}
    ours, theirs = (parse(UNet2DConditionConfig, values)[0] for values in (found.parts["unet"].config, row.unet))
    assert (ours.sample_size, ours.heads, ours.upcast_attention) == (theirs.sample_size, theirs.heads, theirs.upcast_attention)  # fmt: skip
    with torch.device("meta"):
        model = sfumato.UNet2DConditionModel(ours)
    assert {f"model.diffusion_model.{key}" for key in original_state(model, "original")} == {
        key for key in tensors if key.startswith("model.diffusion_model.")
    }
    assert row.vae.items() <= found.parts["vae"].config.items()
    for one in row.encoders:
        assert one.config.items() <= found.parts[one.role].config.items()
    assert sum(part.parameters for part in found.parts.values()) == sum(one.count for one in whole(row.name).values())


@pytest.mark.parametrize(
    "row", [row for row in FAMILIES.values() if row.name != "variations"], ids=lambda row: row.name
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("naming", ["original", "ours"])
def test_a_unet_by_itself(row, prefix, naming):
    if naming == "original" and row.name == "x2-upscaler":
        pytest.skip("never written in that layout")
    with torch.device("meta"):
        model = sfumato.UNet2DConditionModel(**row.unet)
    tensors = stored(original_state(model, naming, prefix))
    tensors |= {marker: Stored("F8_E5M2", (4,)) for marker in row.markers}
    metadata = {"architecture": "stable-diffusion-v2-768-v"} if row.name == "sd21" else {}
    found = detect(header(tensors, FILES.get(row.name, "model"), **metadata))
    assert found.family.name == row.name
    assert set(found.parts) == {"unet"}
    assert found.parts["unet"].naming == naming
    assert set(found.missing) == {"vae", *(one.role for one in row.encoders)}
    for role, sentence in found.missing.items():
        assert f"{role}=…" in sentence
        assert row.title in sentence


def our_names(key, names):
    """Our names for a weight of the original layout: one, or three where three are stored in one."""
    for one in names:
        key = re.sub(one.rule().pattern, one.rule().replacement, key)
    return [key.replace("*", part) for part in "qkv"] if "*" in key else [key]


@pytest.mark.parametrize("row", LAID_OUT, ids=lambda row: row.name)
def test_names_lead_there_and_back(row):
    with torch.device("meta"):
        models = [(sfumato.UNet2DConditionModel(**row.unet), None), (sfumato.AutoencoderKL(**row.vae), None)]
        models += [(sfumato.CLIPTextModelWithProjection(**one.config), OPEN_CLIP) for one in row.encoders if one.naming == "open_clip"]  # fmt: skip
    for model, table in models:
        naming = "original" if table is None else "open_clip"
        if table is None and hasattr(model.config, "cross_attention_dim"):
            table = unet_names(model.config)
        names = table or vae_names(len(model.config.block_out_channels))
        originals = original_state(model, naming)
        back = [key for name in originals for key in our_names(name, names)]
        assert sorted(back) == sorted(model.state_dict())


def test_a_pruned_unet_of_nobodys():
    with torch.device("meta"):
        own = FAMILIES["sdxl"].unet | {"transformer_layers_per_block": (1, 2, 3)}
        model = sfumato.UNet2DConditionModel(**own)
    found = detect(header(stored(original_state(model, "original", "model.diffusion_model."))))
    assert found.family.name == "sdxl"
    assert found.parts["unet"].config["transformer_layers_per_block"] == (1, 2, 3)
    odd = unet_config(stored(sfumato.UNet2DConditionModel(block_out_channels=(32, 64), norm_num_groups=8, attention_head_dim=2, cross_attention_dim=24, down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2, layers_per_block=(1, 3), transformer_layers_per_block=(2, 1)).state_dict()))  # fmt: skip
    assert (odd["layers_per_block"], odd["transformer_layers_per_block"]) == ((1, 3), (2, 1))


def test_distilled_for_few_steps():
    tensors = whole("sd15")
    for spelling in ("time_embed.cond_proj.weight", "time_embedding.cond_proj.weight"):
        found = detect(header(tensors | {f"model.diffusion_model.{spelling}": Stored("F16", (320, 256))}))
        assert found.family.name == "sd15-lcm"
        assert found.family.pipeline == "LatentConsistencyModelPipeline"
        assert (found.steps, found.scheduler["_class_name"]) == (4, "LCMScheduler")
        assert found.parts["unet"].config["time_cond_proj_dim"] == 256
        assert any("cond_proj" in reason for reason in found.reasons)


def real_file(path: Path, tensors: dict[str, Stored], numbers: dict[str, list[float]], dtype="F32") -> Header:
    """A file with this header and a hole in place of weights, but for a few numbers."""
    entries, end = {}, 0
    code = {"F32": "f", "F16": "e"}.get(dtype)
    blobs = {}
    for name, values in numbers.items():
        raw = (
            struct.pack(f"<{len(values)}{code}", *values)
            if code
            else b"".join(struct.pack("<f", v)[2:] for v in values)
        )
        blobs[end] = raw
        entries[name] = {"dtype": dtype, "shape": [len(values)], "data_offsets": [end, end + len(raw)]}
        end += len(raw)
    for name, one in tensors.items():
        if name not in numbers:
            entries[name] = {"dtype": "F16", "shape": list(one.shape), "data_offsets": [end, end + 2 * one.count]}
            end += 2 * one.count
    text = json.dumps(entries).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for begin, raw in blobs.items():
            stream.seek(8 + len(text) + begin)
            stream.write(raw)
        stream.truncate(8 + len(text) + end)
    return read_header(path)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_velocity_is_told_by_the_spread_of_a_bias(dtype, tmp_path):
    bias = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    for spread, family in ((0.2, "sd21"), (0.05, "sd21-base")):
        numbers = {bias: [spread * (-1) ** i for i in range(320)]}
        found = detect(real_file(tmp_path / "model.safetensors", whole("sd21"), numbers, dtype))
        assert found.family.name == family
        assert any("bias" in reason for reason in found.reasons)
    # Its relatives are what they are.
    for name in ("sd21-inpainting", "unclip-h", "depth"):
        found = detect(real_file(tmp_path / "model.safetensors", whole(name), {bias: [0.5, -0.5] * 160}))
        assert found.scheduler.get("prediction_type", "epsilon") == FAMILIES[name].prediction_type


def test_markers(tmp_path):
    plain = whole("sdxl")
    found = detect(header(plain | {"v_pred": Stored("F32", (0,))}))
    assert (found.family.name, found.scheduler["prediction_type"]) == ("sdxl", "v_prediction")
    assert "rescale_betas_zero_snr" not in found.scheduler
    found = detect(header(plain | {"v_pred": Stored("F32", (0,)), "ztsnr": Stored("F32", (0,))}))
    assert found.scheduler["rescale_betas_zero_snr"]
    assert found.scheduler["timestep_spacing"] == "trailing"
    found = detect(real_file(tmp_path / "a.safetensors", plain, {"edm_vpred.sigma_max": [120.0], "edm_vpred.sigma_min": [0.25]}))  # fmt: skip
    assert found.family.name == "cosxl"
    assert (found.scheduler["sigma_max"], found.scheduler["sigma_min"]) == (120.0, 0.25)
    statistics = {"edm_mean": [-1.5, 1.75, -1.25, 2.5], "edm_std": [8.5, 6.0, 6.5, 5.25]}
    found = detect(real_file(tmp_path / "b.safetensors", plain, statistics))
    assert found.family.name == "playground"
    config = found.parts["vae"].config
    assert config["latents_mean"] == (-1.5, 1.75, -1.25, 2.5)
    assert config["latents_std"] == (8.5, 6.0, 6.5, 5.25)
    assert config["scaling_factor"] == 0.5


def test_metadata_and_what_lies_beside():
    plain = whole("sd15")
    assert detect(header(plain, prediction_type="v")).scheduler["prediction_type"] == "v_prediction"
    assert detect(header(plain, resolution="768x512")).parts["unet"].config["sample_size"] == (64, 96)
    assert detect(header(plain, resolution="768x768")).parts["unet"].config["sample_size"] == 96
    assert detect(header(plain, resolution="large")).parts["unet"].config["sample_size"] == 64
    for text, prediction in (
        ('model:\n  params:\n    parameterization: "v"\n', "v_prediction"),
        ("parameterization: v", "v_prediction"),
        ("target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling", "v_prediction"),
        ('parameterization: "eps"', "epsilon"),
        ("use_ema: false", "epsilon"),
    ):
        assert detect(header(plain), yaml=text).scheduler.get("prediction_type", "epsilon") == prediction
    assert detect(header(whole("sdxl"), title="SDXL Turbo")).family.name == "sdxl-turbo"
    assert detect(header(whole("sdxl"), "sdxl_lightning_8step")).steps == 8
    assert detect(header(whole("sd15"), "sd_xl_turbo")).family.name == "sd15"


def test_the_users_word_goes_before_everything():
    tensors = whole("sdxl") | {"v_pred": Stored("F32", (0,))}
    found = detect(header(tensors), prediction_type="epsilon")
    assert found.scheduler.get("prediction_type", "epsilon") == "epsilon"
    assert found.notes == ("file.safetensors is assumed to predict epsilon, as requested; detected: v_prediction (it has the marker v_pred)",)  # fmt: skip
    assert detect(header(tensors), prediction_type="v_prediction").notes == ()
    assert detect(header(whole("sdxl")), prediction_type="v_prediction").notes == ()
    found = detect(header(whole("sdxl")), family="sdxl-turbo")
    assert (found.family.name, found.steps) == ("sdxl-turbo", 1)
    with pytest.raises(UsageError, match=r"no family 'sdxll' \(did you mean 'sdxl'\?\); use one of sd15, "):
        detect(header(tensors), family="sdxll")
    with pytest.raises(UsageError, match="prediction_type must be epsilon, v_prediction or sample, not 'w'"):
        detect(header(tensors), prediction_type="w")


def test_layouts_that_are_not_the_usual_ones():
    xl = whole("sdxl")
    without_big = {name: one for name, one in xl.items() if "embedders.1" not in name}
    found = detect(header(without_big))
    assert found.family.name == "sdxl"
    assert set(found.missing) == {"text_encoder_2"}
    # Stable Diffusion 2 in the layout of its successor.
    moved = {name.replace("cond_stage_model.model.", "conditioner.embedders.0.model."): one for name, one in whole("sd21").items()}  # fmt: skip
    found = detect(header(moved))
    assert found.family.name == "sd21-base"
    assert set(found.parts) == {"unet", "vae", "text_encoder"}
    # A text encoder of another family is left out, and said so.
    mixed = {name: one for name, one in xl.items() if not name.startswith("conditioner.")}
    mixed |= {name: one for name, one in whole("sd21").items() if name.startswith("cond_stage_model.")}
    found = detect(header(mixed))
    assert found.family.name == "sdxl"
    no_l = {name: one for name, one in whole("sd15").items() if not name.startswith("cond_stage")}
    no_l |= {name: one for name, one in whole("sd21").items() if name.startswith("cond_stage_model.")}
    found = detect(header(no_l))
    assert found.family.name == "sd15"
    assert "text_encoder" in found.missing
    assert "ignored" in found.notes[0]
    for prefix in ("first_stage_model.", "vae.", ""):
        with torch.device("meta"):
            vae = sfumato.AutoencoderKL(**FAMILIES["sd15"].vae)
        for naming in ("original", "ours"):
            found = detect(header(stored(original_state(vae, naming, prefix))), vae=True)
            assert found.parts["vae"].naming == naming
            assert "scale" in found.notes[0]


KINDS = {
    "a LoRA": ["lora_unet_down_blocks_0.lora_down.weight", "lora_te_text_model.alpha"],
    "a LoRA (peft)": ["unet.down_blocks.0.attentions.0.to_k.lora_A.weight"],
    "a ControlNet": ["control_model.input_blocks.0.0.weight", "control_model.time_embed.0.weight"],
    "a ControlNet (ours)": ["controlnet_cond_embedding.conv_in.weight", "conv_in.weight", "down_blocks.0.resnets.0.norm1.weight"],
    "an autoencoder (VAE)": ["decoder.conv_in.weight", "encoder.conv_in.weight"],
    "a Flux model": ["double_blocks.0.img_attn.norm.key_norm.scale"],
    "a Flux model (whole)": ["model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale"],
    "a Stable Diffusion 3 model": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
    "a Stable Cascade model": ["clip_txt_mapper.weight"],
    "an AnimateDiff motion module": ["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"],
    "a T2I-Adapter": ["adapter.body.0.in_conv.weight"],
    "an IP-Adapter": ["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"],
    "a textual inversion": ["emb_params"],
    "a textual inversion (XL)": ["clip_l", "clip_g"],
    "a T5 text encoder": ["encoder.block.0.layer.0.SelfAttention.q.weight"],
    "a CLIP encoder": ["text_model.embeddings.token_embedding.weight"],
    "an upscaler of pixels (ESRGAN)": ["conv_first.weight"],
    "a transformer of another family": ["transformer_blocks.0.attn1.to_q.weight"],
    "of a kind that is not known": ["weight"],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_checkpoint_is_called_by_its_name(kind):
    tensors = {name: Stored("F16", (8, 8, 1, 1)) for name in KINDS[kind]}
    with pytest.raises(CheckpointError) as caught:
        detect(header(tensors))
    message = str(caught.value)
    assert f"file.safetensors is {kind.partition(' (')[0] if kind.endswith(('(peft)', '(ours)', '(whole)', '(XL)')) else kind}, not a checkpoint" in message  # fmt: skip
    assert "give a file with a U-Net" in message
    assert "\n" not in message


def test_unets_of_no_family_and_damaged_ones():
    with torch.device("meta"):
        model = sfumato.UNet2DConditionModel(**FAMILIES["sd15"].unet | {"in_channels": 13})
    tensors = stored(original_state(model, "original", "model.diffusion_model."))
    with pytest.raises(CheckpointError, match=r"has a U-Net with 13 input channels; specify one with family=…: sd15"):
        detect(header(tensors))
    assert detect(header(tensors), family="sd15").parts["unet"].config["in_channels"] == 13
    broken = tensors | {"model.diffusion_model.input_blocks.1.0.out_layers.3.weight": Stored("F16", ())}
    with pytest.raises(CheckpointError, match="has an unknown shape"):
        detect(header(broken))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "does not begin with a header"),
        (b"\x00" * 100, "does not begin with a header"),
        (b"\xff" * 100, "does not begin with a header"),
        ((20).to_bytes(8, "little") + b"this is no JSON at all", "truncated or not a safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "truncated or not a safetensors file"),
    ],
)
def test_files_that_are_no_safetensors(content, reason, tmp_path):
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        read_header(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1]},
        {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
        [],
        None,
    ],
)
def test_entries_that_describe_nothing(entry, tmp_path):
    text = json.dumps({"x": entry}).encode()
    (tmp_path / "file.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        read_header(tmp_path / "file.safetensors")


def test_a_file_that_is_cut_off_and_one_that_goes_on(tmp_path):
    path = tmp_path / "file.safetensors"
    save_file({"x": torch.zeros(100)}, path, {"format": "pt", "modelspec.title": "x"})
    content = path.read_bytes()
    path.write_bytes(content + b"more")
    assert read_header(path).tensors["x"].count == 100
    assert read_header(path).metadata["modelspec.title"] == "x"
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="is truncated: 399 of its 400 bytes"):
        read_header(path)
    with pytest.raises(CheckpointError, match="it is not there"):
        read_header(tmp_path / "none.safetensors")


def test_a_file_of_seven_gigabytes_is_known_at_once(tmp_path):
    """Without torch, in a fraction of a second, and without the memory for a weight."""
    path = tmp_path / "sd_xl_base_1.0.safetensors"
    real_file(path, whole("sdxl"), {"edm_nothing": [0.0]})
    assert path.stat().st_size > 6.9e9
    code = """
import sys, time
from pathlib import Path
began = time.perf_counter()
from sfumato.checkpoints.detect import detect
from sfumato.checkpoints.headers import read_header
found = detect(read_header(Path(sys.argv[1])))
status = Path("/proc/self/status")
peak = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")) if status.exists() else 0
print(found.family.name, time.perf_counter() - began, peak, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    name, seconds, kilobytes, torch_too = done.stdout.split()
    assert (name, torch_too) == ("sdxl", "False")
    assert float(seconds) < 1.5  # a tenth of it where nothing else runs
    assert int(kilobytes) < 50_000


def test_notes_are_logged_once(tmp_path, caplog):
    from sfumato.checkpoints.single_file import open_single_file

    path = tmp_path / "model.safetensors"
    real_file(path, whole("sdxl") | {"v_pred": Stored("F32", (0,))}, {})
    with caplog.at_level(logging.WARNING, logger="sfumato"):
        open_single_file(path, prediction_type="epsilon")
    assert len([record for record in caplog.records if "as requested" in record.getMessage()]) == 1


def test_names_say_the_steps_of_few():
    for name, family, steps, prediction in (
        ("sdxl_lightning_8step_unet", "sdxl-lightning", 8, "epsilon"),
        ("sdxl_lightning_1step_x0", "sdxl-lightning", 1, "sample"),
        ("sdxl_lightning", "sdxl-lightning", 4, "epsilon"),
        ("Hyper-SDXL-8steps-CFG", "hyper-sdxl", 8, "epsilon"),
        ("Hyper-SDXL-1step-Unet", "hyper-sdxl", 1, "epsilon"),
        ("sd_xl_turbo_1.0", "sdxl-turbo", 1, "epsilon"),
        ("my_x0_merge", "sdxl", 50, "epsilon"),
    ):
        found = detect(header(whole("sdxl"), name))
        assert (found.family.name, found.steps, found.scheduler.get("prediction_type", "epsilon")) == (
            family,
            steps,
            prediction,
        )
        assert found.family.guidance == (5.0 if family == "sdxl" else 0.0)
        assert found.scheduler.get("timestep_spacing") == ("leading" if family == "sdxl" else "trailing")
