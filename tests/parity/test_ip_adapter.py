"""IP-Adapters against the reference: plain and plus, with masks, several at once, down to the images."""

from __future__ import annotations

import dataclasses

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

import sfumato
from sfumato.errors import CheckpointError, UsageError
from sfumato.models import CLIPVisionModelWithProjection
from sfumato.pipelines.recipe import checked
from sfumato.pipelines.residuals import Steered
from sfumato.request import GenerateRequest, ImagePrompt
from sfumato.runtime.choices import Wishes
from support.checkpoints import UNET, randomize
from support.compare import FLOAT32, distance
from support.control import control_net, control_picture
from support.pictures import compare

VISION = {"hidden_size": 32, "intermediate_size": 48, "projection_dim": 20, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28, "patch_size": 7}  # fmt: skip
# The reference knows plain adapters of four tokens and plus ones of four layers.
WIDTH, TOKENS = UNET["cross_attention_dim"], 4


def adapter(kind="plain", seed=0):
    """A random adapter for the small checkpoint, as a file has it."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=random) / shape[-1] ** 0.5

    if kind == "plain":
        proj = {"proj.weight": draw(TOKENS * WIDTH, 20), "proj.bias": draw(TOKENS * WIDTH), "norm.weight": draw(WIDTH) + 1, "norm.bias": draw(WIDTH)}  # fmt: skip
    elif kind == "full":
        proj = {"proj.0.weight": draw(32, 32), "proj.0.bias": draw(32), "proj.2.weight": draw(WIDTH, 32), "proj.2.bias": draw(WIDTH), "proj.3.weight": draw(WIDTH) + 1, "proj.3.bias": draw(WIDTH)}  # fmt: skip
    else:
        dim, inner = 40, 128
        proj = {"latents": draw(1, TOKENS, dim), "proj_in.weight": draw(dim, 32), "proj_in.bias": draw(dim), "proj_out.weight": draw(WIDTH, dim), "proj_out.bias": draw(WIDTH), "norm_out.weight": draw(WIDTH) + 1, "norm_out.bias": draw(WIDTH)}  # fmt: skip
        for i in range(4):
            proj |= {f"layers.{i}.0.{name}.{part}": draw(dim) + (part == "weight") for name in ("norm1", "norm2") for part in ("weight", "bias")}  # fmt: skip
            proj |= {f"layers.{i}.0.to_q.weight": draw(inner, dim), f"layers.{i}.0.to_kv.weight": draw(2 * inner, dim), f"layers.{i}.0.to_out.weight": draw(dim, inner)}  # fmt: skip
            proj |= {f"layers.{i}.1.0.weight": draw(dim) + 1, f"layers.{i}.1.0.bias": draw(dim), f"layers.{i}.1.1.weight": draw(4 * dim, dim), f"layers.{i}.1.3.weight": draw(dim, 4 * dim)}  # fmt: skip
    unet = sfumato.UNet2DConditionModel(**UNET)
    blocks = (unet.down_blocks, unet.up_blocks, unet.mid_block)
    widths = [block.attn2.to_q.out_features for part in blocks for block in part.modules() if hasattr(block, "attn2")]
    ip = {f"{2 * i + 1}.to_{name}_ip.weight": draw(width, WIDTH) for i, width in enumerate(widths) for name in "kv"}
    return {"image_proj": proj, "ip_adapter": ip}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("ip")
    randomize(CLIPVisionModelWithProjection(**VISION)).save_pretrained(root / "encoder")
    for kind in ("plain", "plus", "full"):
        flat = {f"{group}.{key}": value for group, part in adapter(kind).items() for key, value in part.items()}
        save_file(flat, root / f"{kind}.safetensors")
    control_picture(40, 30).save(root / "image.png")
    control_picture(30, 40, seed=1).save(root / "other.png")
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[:, :8] = 255
    Image.fromarray(mask).save(root / "mask.png")
    return root


def prompt(files, kind="plain", **fields):
    names = {"model": f"{kind}.safetensors", "image": "image.png", "encoder": "encoder"} | {
        key: fields.pop(key) for key in ("model", "image", "encoder", "mask") if key in fields
    }
    return ImagePrompt(**{key: str(files / name) for key, name in names.items()}, **fields)


@pytest.fixture(scope="module")
def pipeline(checkpoints):
    return sfumato.load(checkpoints(), device="cpu", dtype=torch.float32)


def drawn(pipeline, *prompts, **fields):
    request = GenerateRequest(**{"prompt": "a photo", "seed": 3, "steps": 3, "image_prompts": prompts} | fields)
    result = pipeline.generate(request)
    return np.asarray(result.images[0]).astype(int), result


CALLS = {
    "plain": [("plain", "image.png", 1.0, None)],
    "plus": [("plus", "image.png", 0.7, None)],
    "full-face": [("full", "image.png", 0.7, None)],
    "a mask": [("plain", "image.png", 1.0, "mask.png")],
    "two": [("plain", "image.png", 0.5, None), ("plus", "other.png", 0.8, None)],
}


@pytest.mark.parametrize("uses", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_images_are_the_references(uses, guidance, files, pipeline, checkpoints):
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    mine, _ = drawn(
        pipeline,
        *(
            prompt(files, kind, image=image, scale=scale, **({"mask": mask} if mask else {}))
            for kind, image, scale, mask in uses
        ),
        guidance_scale=guidance,
    )
    other = diffusers.StableDiffusionPipeline.from_pretrained(checkpoints())
    other.set_progress_bar_config(disable=True)
    encoder = transformers.CLIPVisionModelWithProjection.from_pretrained(files / "encoder").eval()
    reader = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    other.register_modules(image_encoder=encoder, feature_extractor=reader)
    other.unet._load_ip_adapter_weights([adapter(kind) for kind, *_ in uses])
    other.set_ip_adapter_scale([scale for *_, scale, _ in uses])
    masks = [torch.from_numpy(np.asarray(Image.open(files / mask)) / 255.0).float()[None, None] for *_, mask in uses if mask]  # fmt: skip
    call = {"cross_attention_kwargs": {"ip_adapter_masks": masks}} if masks else {}
    images = [Image.open(files / image) for _, image, *_ in uses]
    theirs = other("a photo", ip_adapter_image=images, num_inference_steps=3, guidance_scale=guidance, generator=torch.Generator().manual_seed(3), **call).images[0]  # fmt: skip
    assert abs(mine - np.asarray(theirs).astype(int)).max() <= 1
    assert abs(mine - drawn(pipeline, guidance_scale=guidance)[0]).max() > 3


def test_transparent_parts_of_a_mask_are_black(files, pipeline):
    clear = Image.new("L", (16, 16), 255)
    clear.putalpha(Image.open(files / "mask.png"))
    clear.save(files / "clear.png")
    masked = [drawn(pipeline, prompt(files, mask=name))[0] for name in ("mask.png", "clear.png")]
    assert (masked[0] == masked[1]).all()


@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_every_joined_prompt_sees_the_image(guidance, files, pipeline):
    how = {"guidance_scale": guidance, "prompt_syntax": "a1111"}
    joined = drawn(pipeline, prompt(files), prompt="a photo :0.5 AND a photo :0.5", **how)[0]
    assert abs(joined - drawn(pipeline, prompt(files), **how)[0]).max() <= 1


def test_recipes_repeat_image_prompts_and_staged_networks_read_them(files, pipeline, checkpoints):
    mine, result = drawn(pipeline, prompt(files))
    told, scheduler = checked(result.recipes[0], "here")
    assert len(told.image_prompts[0].hashes) == 3
    staged = sfumato.load(checkpoints(), device="cpu", dtype=torch.float32, offload="staged", request=told)
    staged.scheduler = scheduler
    for _ in range(2):
        again = staged.generate(told.replace(scheduler=None)).images[0]
        assert (np.asarray(again) == mine).all()
    changed = told.image_prompts[0].replace(image=str(files / "other.png"))
    with pytest.raises(UsageError, match="are not those of the recipe"):
        pipeline.generate(told.replace(image_prompts=(changed,)))


def test_files_that_do_not_fit(files, pipeline, tmp_path):
    randomize(CLIPVisionModelWithProjection(**VISION | {"projection_dim": 24})).save_pretrained(tmp_path / "encoder")
    with pytest.raises(CheckpointError, match=r"needs 20 values per image, but this image encoder gives 24"):
        drawn(pipeline, prompt(files).replace(encoder=str(tmp_path / "encoder")))
    save_file({"image_proj.proj.0.weight": torch.zeros(1), "image_proj.norm.weight": torch.zeros(1)}, tmp_path / "face.safetensors")  # fmt: skip
    with pytest.raises(CheckpointError, match="is not a plain, plus or full-face IP-Adapter; FaceID"):
        drawn(pipeline, prompt(files).replace(model=str(tmp_path / "face.safetensors")))
    short = {f"{group}.{key}": value for group, part in adapter().items() for key, value in part.items() if not key.startswith("1.")}  # fmt: skip
    save_file(short, tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match="is for another family"):
        drawn(pipeline, prompt(files).replace(model=str(tmp_path / "short.safetensors")))


# What the ecosystem's code says to a pipeline: adapters, their scales, and the arguments of a call.
IMAGES = {"one": control_picture(40, 30), "other": control_picture(30, 40, seed=1)}
HALF = torch.zeros(1, 1, 16, 16)
HALF[..., :8] = 1
USES = {
    "plain": (["plain"], 0.6, {"ip_adapter_image": IMAGES["one"]}),
    "full-face": (["full"], 1.0, {"ip_adapter_image": IMAGES["one"]}),
    "without guidance": (["plus"], 1.0, {"ip_adapter_image": IMAGES["one"], "guidance_scale": 1.0}),
    "two, with scales": (["plain", "plus"], [0.5, 0.9], {"ip_adapter_image": [IMAGES["one"], IMAGES["other"]]}),
    "several images of one": (["plain"], 0.8, {"ip_adapter_image": [[IMAGES["one"], IMAGES["other"]]]}),
    "by block": (["plain"], {"down": {"block_2": 1.0}, "up": {"block_1": [0.5, 1.0]}}, {"ip_adapter_image": IMAGES["one"]}),
    "a mask": (["plain"], 0.8, {"ip_adapter_image": IMAGES["one"], "cross_attention_kwargs": {"ip_adapter_masks": [HALF]}}),
    "a mask for each image": (["plus"], [[0.7, 0.4]], {"ip_adapter_image": [[IMAGES["one"], IMAGES["other"]]], "cross_attention_kwargs": {"ip_adapter_masks": [torch.cat([HALF, 1 - HALF], dim=1)]}}),
    "several of a prompt": (["plain"], 0.8, {"ip_adapter_image": IMAGES["one"], "num_images_per_prompt": 2}),
}  # fmt: skip


@pytest.fixture
def pair(files, _loaded):
    """`pair(["plain"])`: pipelines of both libraries that have loaded these adapters from their files."""
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    def get(kinds, shape="sd15", kind="StableDiffusionPipeline", **more):
        pipes = []
        for name, library in (("ours", sfumato), ("theirs", diffusers)):
            parts = {key: value for key, value in _loaded(shape, name).items() if key != "image_encoder"}
            parts["scheduler"] = type(parts["scheduler"]).from_config(parts["scheduler"].config)
            given = {key: value(library) for key, value in more.items()}
            pipe = getattr(library, kind)(**parts, **given, requires_safety_checker=False)
            pipe.set_progress_bar_config(disable=True)
            pipes.append(pipe)
        mine, other = pipes
        mine.load_ip_adapter(str(files), weight_name=[f"{one}.safetensors" for one in kinds], image_encoder_folder=str(files / "encoder"))  # fmt: skip
        encoder = transformers.CLIPVisionModelWithProjection.from_pretrained(files / "encoder").eval()
        reader = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        other.register_modules(image_encoder=encoder, feature_extractor=reader)
        other.load_ip_adapter(str(files), subfolder="", weight_name=[f"{one}.safetensors" for one in kinds], image_encoder_folder=None)  # fmt: skip
        yield_to.append(other)
        return mine, other

    yield_to = []
    yield get
    for other in yield_to:  # its U-Net is shared by other tests
        other.unload_ip_adapter()


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_pipelines_load_adapters_as_the_references_do(use, pair):
    kinds, scale, call = use
    pipes = pair(kinds)
    for pipe in pipes:
        pipe.set_ip_adapter_scale(scale)
    compare(*pipes, prompt="a photo", num_inference_steps=3, **call)


def test_embeddings_of_images_are_made_once_and_used_again(pair):
    mine, other = pair(["plus"])
    told = [pipe.prepare_ip_adapter_image_embeds(IMAGES["one"], None, "cpu", 1, True) for pipe in (mine, other)]
    assert distance(told[0][0], told[1][0]) < FLOAT32
    compare(mine, other, prompt="a photo", ip_adapter_image_embeds=told[1])


def test_an_adapter_beside_a_controlnet(pair):
    pipes = pair(["plain"], kind="StableDiffusionControlNetPipeline", controlnet=control_net)
    compare(*pipes, prompt="a photo", image=control_picture(), ip_adapter_image=IMAGES["one"])


def test_networks_beside_the_unet_compute_as_planned(pair):
    """On a faulty device, the resampler and the ControlNet use its fallbacks as well, and draw the same."""
    called, batches, layouts = set(), set(), set()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            called.add(getattr(func, "__name__", ""))
            if func is torch.nn.functional.conv2d:
                batches.add(args[0].shape[0])
                layouts.add(args[0].is_contiguous())
            return func(*args, **kwargs or {})

    mine, _ = pair(["plus"], kind="StableDiffusionControlNetPipeline", controlnet=control_net)
    mine.place.wishes = Wishes(engine="torch")
    call = {"image": [control_picture(), control_picture(seed=1)], "ip_adapter_image": IMAGES["one"], "num_inference_steps": 2, "output_type": "latent"}  # fmt: skip

    def drawn():
        with Watch():
            return mine(["a photo", "a cat"], generator=torch.Generator().manual_seed(1), **call).images

    healthy = drawn()
    assert "scaled_dot_product_attention" in called
    assert max(batches) > 1
    verdicts = {"chunks float32": "off by 20 %", "batch float32": "off by 30 %"}
    mine.place.facts = dataclasses.replace(mine.place.facts, canaries=verdicts)
    called.clear()
    batches.clear()
    assert distance(drawn(), healthy) < FLOAT32
    assert "scaled_dot_product_attention" not in called
    assert batches == {1}
    layouts.clear()
    net, picture = control_net(sfumato), torch.rand(1, 3, 16, 16).to(memory_format=torch.channels_last)
    with Watch():
        assert Steered(net, picture).within(slice(2, 6), slice(0, 4)).hint.is_contiguous()
    assert layouts == {True}


def test_unloaded_adapters_leave_no_trace(pair):
    mine, _ = pair(["plain"])
    call = {"num_inference_steps": 2, "output_type": "latent"}
    plain, _, after = (
        mine("a", generator=torch.Generator().manual_seed(1), **call, **more).images
        for more in ({}, {"ip_adapter_image": IMAGES["one"]}, {})
    )
    assert torch.equal(plain, after)
    mine.unload_ip_adapter()
    assert mine.image_encoder is None
    with pytest.raises(UsageError, match="needs an IP-Adapter; load one with load_ip_adapter"):
        mine("a", ip_adapter_image=IMAGES["one"], **call)


def test_what_cannot_be_loaded(pair, files, ours):
    mine = ours()
    with pytest.raises(UsageError, match="got 2 of subfolder for 3 IP-Adapters"):
        mine.load_ip_adapter(str(files), subfolder=["", ""], weight_name=["plain.safetensors"] * 3)
    with pytest.raises(UsageError, match="there is no folder image_encoder with the image encoder"):
        mine.load_ip_adapter(str(files / "plain.safetensors"))
    mine.load_ip_adapter(adapter("plain"), image_encoder_folder=None)
    with pytest.raises(UsageError, match="ip_adapter_image needs an image encoder"):
        mine("a", ip_adapter_image=IMAGES["one"], num_inference_steps=1)
    with pytest.raises(UsageError, match="got 2 of scales for 1 IP-Adapters"):
        mine.set_ip_adapter_scale([0.1, 0.2])
