"""What is steered in other ways than text to image, against the reference: within masks, by unions, by T2I-Adapters."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch
from PIL import Image

import sfumato
from sfumato.errors import CheckpointError, UsageError
from support.checkpoints import EVERY
from support.compare import FLOAT32, distance, generator
from support.control import control_net, control_picture, t2i_adapter, union_net
from support.pictures import PROMPTS, compare, picture

NETS = {"": control_net, "Union": union_net, "Adapter": t2i_adapter}


@pytest.fixture
def pair(_loaded):
    """`pair("StableDiffusionXLControlNetPipeline", "sdxl")`: both libraries' pipelines with the same random network."""

    def get(kind, shape, *seeds, **options):
        pipes = []
        make = next(make for word, make in reversed(NETS.items()) if word in kind)
        for name, library in (("ours", sfumato), ("theirs", diffusers)):
            nets = [make(library, shape, seed, **options) for seed in seeds or (0,)]
            parts = dict(_loaded(shape, name))
            parts["scheduler"] = type(parts["scheduler"]).from_config(parts["scheduler"].config)
            flags = {} if "XL" in kind else {"requires_safety_checker": False}
            beside = "adapter" if "Adapter" in kind else "controlnet"
            if beside == "adapter" and "XL" not in kind and name == "theirs":
                parts.pop("image_encoder", None)
            several = diffusers.MultiAdapter if (beside, name) == ("adapter", "theirs") else list
            net = several(nets) if seeds else nets[0]
            pipe = getattr(library, kind)(**parts, **flags, **{beside: net})
            pipe.set_progress_bar_config(disable=True)
            pipes.append(pipe)
        return pipes

    return get


# IP-Adapters beside what already reads an image.
LEFT_OUT = {"StableDiffusionInstructPix2PixPipeline": {"ip_adapter_image", "ip_adapter_image_embeds"}}


@pytest.mark.parametrize("name", [name for name in sfumato.__all__ if (name.endswith("Pipeline") and "Control" in name) or ("Adapter" in name and name.endswith("Pipeline"))])  # fmt: skip
def test_signatures_are_the_references(name):
    ours, theirs = (inspect.signature(getattr(library, name).__call__).parameters for library in (sfumato, diffusers))
    mine = {one.name: one.default for one in ours.values() if one.name != "unknown"}
    other = {one.name: tuple(one.default) if isinstance(one.default, list) else one.default for one in theirs.values() if one.name != "kwargs"}  # fmt: skip
    other = {key: None if value is inspect.Parameter.empty and key != "self" else value for key, value in other.items()}
    mine = {key: None if value is inspect.Parameter.empty and key != "self" else value for key, value in mine.items()}
    # What is left out is refused in a sentence: an argument of the ecosystem without an effect here.
    assert list(mine) == [key for key in other if key in mine]
    assert {key: other[key] for key in mine} == mine
    assert other.keys() - mine.keys() <= LEFT_OUT.get(name, set())
    assert getattr(sfumato, name).__call__.__doc__


MASK = Image.new("L", (16, 16))
MASK.paste(255, (3, 5, 11, 14))
INPAINT = {
    "as it is": {},
    "half the strength": {"strength": 0.5, "control_guidance_end": 0.7},
    "guess mode": {"guess_mode": True, "controlnet_conditioning_scale": 1.0},
    "without guidance": {"guidance_scale": 1.0},
    "its own size": {"image": picture(24, 32), "mask_image": MASK.resize((24, 32)), "control_image": control_picture(24, 32)},
    "another size": {"width": 24, "height": 16},
    "several of a prompt": {"num_images_per_prompt": 2},
}  # fmt: skip


@pytest.mark.parametrize("shape", ["sd15", "inpaint"])
@pytest.mark.parametrize("call", INPAINT.values(), ids=INPAINT)
def test_within_a_mask(shape, call, pair):
    call = {
        "prompt": PROMPTS[0],
        "image": picture(),
        "mask_image": MASK,
        "control_image": control_picture(seed=3),
    } | call
    compare(*pair("StableDiffusionControlNetInpaintPipeline", shape), **{"num_inference_steps": 4} | call)


@pytest.mark.parametrize("shape", ["sdxl", "inpaint-xl"])
@pytest.mark.parametrize("call", [{}, {"strength": 0.6, "guess_mode": True}, {"original_size": (20, 30), "crops_coords_top_left": (1, 2)}], ids=str)  # fmt: skip
def test_within_a_mask_of_xl(shape, call, pair):
    call = {
        "prompt": PROMPTS[0],
        "image": picture(),
        "mask_image": MASK,
        "control_image": control_picture(seed=3),
    } | call
    compare(*pair("StableDiffusionXLControlNetInpaintPipeline", shape), **{"num_inference_steps": 4} | call)


def test_within_what_surrounds_a_mask(pair):
    import numpy as np

    call = {
        "prompt": PROMPTS[0],
        "image": picture(40, 40),
        "control_image": control_picture(40, 40),
        "padding_mask_crop": 4,
    }
    mask = Image.new("L", (40, 40))
    mask.paste(255, (10, 12, 20, 24))
    pipes = pair("StableDiffusionControlNetInpaintPipeline", "sd15")
    call |= {"mask_image": mask, "num_inference_steps": 3, "width": 24, "height": 24}
    mine, other = (np.asarray(pipe(generator=generator(), **call).images[0]).astype(int) for pipe in pipes)
    assert abs(mine - other).max() <= 1


UNION = {
    "one": {"control_image": control_picture(), "control_mode": 3},
    "weaker": {"control_image": control_picture(), "control_mode": 1, "controlnet_conditioning_scale": 0.4},
    "two kinds": {"control_image": [control_picture(), control_picture(seed=4)], "control_mode": [0, 3]},
    "two scales": {"control_image": [control_picture(), control_picture(seed=4)], "control_mode": [5, 2], "controlnet_conditioning_scale": [0.3, 0.9]},
    "late": {"control_image": control_picture(), "control_mode": 3, "control_guidance_start": 0.5, "num_inference_steps": 4},
    "without guidance": {"control_image": control_picture(), "control_mode": 3, "guidance_scale": 1.0, "guess_mode": True},
    "several of a prompt": {"control_image": control_picture(), "control_mode": 3, "num_images_per_prompt": 2},
}  # fmt: skip


@pytest.mark.parametrize("call", UNION.values(), ids=UNION)
def test_a_union(call, pair):
    pipes = pair("StableDiffusionXLControlNetUnionPipeline", "sdxl")
    compare(*pipes, **{"prompt": PROMPTS[0], "num_inference_steps": 3} | call)


def test_several_unions(pair):
    pictures = [control_picture(), control_picture(seed=4)]
    pipes = pair("StableDiffusionXLControlNetUnionPipeline", "sdxl", 1, 2)
    compare(*pipes, prompt=PROMPTS[0], control_image=pictures, control_mode=[1, 3], num_inference_steps=3)
    assert isinstance(pipes[0].controlnet, sfumato.MultiControlNetUnionModel)


def test_unions_from_an_image_and_within_a_mask(pair):
    call = {"prompt": PROMPTS[0], "image": picture(), "control_image": control_picture(), "control_mode": 3}
    compare(*pair("StableDiffusionXLControlNetUnionImg2ImgPipeline", "sdxl"), **call, num_inference_steps=5)
    call |= {"mask_image": MASK, "num_inference_steps": 4}
    compare(*pair("StableDiffusionXLControlNetUnionInpaintPipeline", "sdxl"), **call)


def test_a_union_in_guess_mode_with_guidance_where_the_reference_fails(pair):
    mine, _ = pair("StableDiffusionXLControlNetUnionPipeline", "sdxl")
    call = {"control_image": control_picture(), "control_mode": 3, "num_inference_steps": 2, "output_type": "latent"}
    made = [mine(PROMPTS[0], guess_mode=guess, generator=generator(), **call).images for guess in (True, False)]
    assert distance(*made) > 0.01


def test_images_of_a_batch_do_not_see_each_others_pictures(pair):
    mine, _ = pair("StableDiffusionXLControlNetUnionPipeline", "sdxl")
    pictures = torch.rand(2, 3, 16, 16, generator=generator(5))
    call = {"control_mode": 3, "num_inference_steps": 2, "output_type": "latent"}
    both = mine(PROMPTS, control_image=pictures, generator=[generator(1), generator(2)], **call).images
    alone = mine(PROMPTS[1], control_image=pictures[1:], generator=generator(2), **call).images
    assert distance(both[1:], alone) < FLOAT32


BAD = {
    "control_mode must have one number for each of the 1 control images": {"control_mode": None},
    "control_mode must have one number for each of the 2 control images": {"control_image": [control_picture()] * 2},
    "has the control modes 0 to 5, and 9 is none of them": {"control_mode": 9},
}  # fmt: skip


@pytest.mark.parametrize(("message", "call"), BAD.items(), ids=BAD)
def test_bad_modes(message, call, pair):
    mine, _ = pair("StableDiffusionXLControlNetUnionPipeline", "sdxl")
    with pytest.raises(UsageError) as error:
        mine(PROMPTS[0], **{"control_image": control_picture(), "control_mode": 3, "num_inference_steps": 1} | call)
    assert message in str(error.value)


ADAPTER = {
    "as it is": {},
    "weaker": {"adapter_conditioning_scale": 0.4},
    "another size": {"image": control_picture(40, 24), "width": 32, "height": 16},
    "a tensor": {"image": torch.rand(1, 3, 16, 16, generator=generator(5))},
    "several of a prompt": {"num_images_per_prompt": 2},
}


@pytest.mark.parametrize("call", ADAPTER.values(), ids=ADAPTER)
def test_t2i_adapters(call, pair):
    call = {"prompt": PROMPTS[0], "image": control_picture(), "num_inference_steps": 3} | call
    compare(*pair("StableDiffusionAdapterPipeline", "sd15"), **call)


def test_several_t2i_adapters(pair):
    call = {"prompt": PROMPTS[0], "image": [control_picture(), control_picture(seed=2)], "num_inference_steps": 3}
    compare(*pair("StableDiffusionAdapterPipeline", "sd15", 1, 2), **call, adapter_conditioning_scale=[0.4, 0.9])


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.0])
def test_t2i_adapters_of_xl(factor, pair):
    call = {"prompt": PROMPTS[0], "image": control_picture(32, 32), "num_inference_steps": 4}
    compare(*pair("StableDiffusionXLAdapterPipeline", "sdxl"), **call, adapter_conditioning_factor=factor)


def test_pipelines_by_task(ours):
    plain = ours("sdxl")
    net, union = control_net(sfumato, "sdxl"), union_net(sfumato)
    made = sfumato.AutoPipelineForInpainting.from_pipe(plain, controlnet=net)
    assert type(made) is sfumato.StableDiffusionXLControlNetInpaintPipeline
    assert type(sfumato.AutoPipelineForText2Image.from_pipe(made)) is sfumato.StableDiffusionXLControlNetPipeline
    made = sfumato.AutoPipelineForImage2Image.from_pipe(plain, controlnet=union)
    assert type(made) is sfumato.StableDiffusionXLControlNetUnionImg2ImgPipeline
    with pytest.raises(UsageError, match="does not support Stable Diffusion XL"):
        sfumato.StableDiffusionControlNetPipeline.from_pipe(plain, controlnet=net)


@pytest.mark.parametrize("kind", ["StableDiffusionAdapterPipeline", "StableDiffusionXLControlNetUnionPipeline"])
def test_saved_and_loaded(kind, pair, tmp_path):
    mine, _ = pair(kind, "sdxl" if "XL" in kind else "sd15")
    mine.save_pretrained(tmp_path)
    again = sfumato.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is type(mine)
    again.set_progress_bar_config(disable=True)
    name = "image" if "Adapter" in kind else "control_image"
    call = {"prompt": PROMPTS[0], name: control_picture(), "num_inference_steps": 2, "output_type": "latent"}
    call |= {} if "Adapter" in kind else {"control_mode": 2}
    assert torch.equal(again(generator=generator(), **call).images, mine(generator=generator(), **call).images)
    getattr(diffusers, kind).from_pretrained(tmp_path)


def test_the_network_of_a_union_alone(tmp_path):
    from safetensors.torch import save_file

    theirs = union_net(diffusers, "sdxl", norm_num_groups=32, block_out_channels=[32, 64], num_trans_channel=32, num_proj_channel=32, attention_head_dim=[1, 1], addition_time_embed_dim=256, projection_class_embeddings_input_dim=1576, num_control_type=8)  # fmt: skip
    theirs.save_pretrained(tmp_path / "folder")
    save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, tmp_path / "net.safetensors")
    ours = sfumato.ControlNetUnionModel.from_pretrained(tmp_path / "folder")
    file = sfumato.ControlNetUnionModel.from_single_file(tmp_path / "net.safetensors")
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in file.state_dict().items())
    # What no shape tells: the number of heads, and keys that describe the file.
    told = {"transformer_layers_per_block": 1, "num_trans_head": 8, "extra": {}}
    assert file.config.replace(**told) == ours.config.replace(**told)
    told = {"added_cond_kwargs": {"text_embeds": torch.randn(1, 40), "time_ids": torch.ones(1, 6)}}
    told |= {"timestep": 321, "encoder_hidden_states": torch.randn(1, 5, EVERY["sdxl"].unet["cross_attention_dim"])}
    x, pictures = torch.randn(1, 4, 8, 8), [torch.rand(1, 3, 16, 16) for _ in range(2)]
    types = torch.zeros(1, 8).index_fill(1, torch.tensor([1, 7]), 1)
    for several in (1, 2):
        call = told | {
            "controlnet_cond": pictures[:several],
            "control_type": types,
            "control_type_idx": [1, 7][:several],
        }
        with torch.no_grad():
            a = ours(x, **call, conditioning_scale=[0.4, 0.7][:several])
            b = theirs(x, **call, conditioning_scale=[0.4, 0.7][:several])
        assert distance(a.mid_block_res_sample, b.mid_block_res_sample) < FLOAT32
    with pytest.raises(CheckpointError, match=r"open it with ControlNetUnionModel\.from_single_file"):
        sfumato.ControlNetModel.from_single_file(tmp_path / "net.safetensors")
