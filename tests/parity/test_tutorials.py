"""Scripts as people write them for the reference library: they run here with one word changed, and draw the same."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

import sfumato
from support.compare import FLOAT32

DYNAMIC_GUIDANCE = """
import torch
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained(model_id, torch_dtype=torch.float32, use_safetensors=True)
pipeline = pipeline.to("cpu")

def callback_dynamic_cfg(pipe, step_index, timestep, callback_kwargs):
    # adjust the batch_size of prompt_embeds according to guidance_scale
    if step_index == int(pipe.num_timesteps * 0.4):
        prompt_embeds = callback_kwargs["prompt_embeds"]
        prompt_embeds = prompt_embeds.chunk(2)[-1]

        # update guidance_scale and prompt_embeds
        pipe._guidance_scale = 0.0
        callback_kwargs["prompt_embeds"] = prompt_embeds
    return callback_kwargs

generator = torch.Generator(device="cpu").manual_seed(1)
result = pipeline(
    "a cat of the red heart",
    num_inference_steps=6,
    generator=generator,
    callback_on_step_end=callback_dynamic_cfg,
    callback_on_step_end_tensor_inputs=["prompt_embeds"],
    output_type="np",
).images
"""

CANCEL = """
import torch
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained(model_id, safety_checker=None, requires_safety_checker=False)
pipeline.enable_model_cpu_offload() if torch.cuda.is_available() else None

def interrupt_callback(pipeline, i, t, callback_kwargs):
    stop_idx = 2
    if i == stop_idx:
        pipeline._interrupt = True
    return callback_kwargs

result = pipeline(
    "a cat",
    num_inference_steps=8,
    callback_on_step_end=interrupt_callback,
    generator=torch.manual_seed(0),
    output_type="np",
)["images"]
assert pipeline.interrupt
"""

SWAP = """
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
)

pipeline = DiffusionPipeline.from_pretrained(model_id, low_cpu_mem_usage=True)
results = []
for cls in (LMSDiscreteScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler):
    assert cls in pipeline.scheduler.compatibles
    pipeline.scheduler = cls.from_config(pipeline.scheduler.config)
    generator = torch.Generator("cpu").manual_seed(8)
    image = pipeline("a dog in the red house", generator=generator, num_inference_steps=4, output_type="np").images[0]
    results.append(image)
pipeline.scheduler.save_config(folder)
config = DPMSolverMultistepScheduler.load_config(folder)
pipeline.scheduler = DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True)
results.append(pipeline("a dog", generator=torch.manual_seed(1), num_inference_steps=4, output_type="np").images[0])
result = results
"""

DECONSTRUCTED = """
import torch
from PIL import Image
from diffusers import AutoencoderKL, UNet2DConditionModel, UniPCMultistepScheduler

vae = AutoencoderKL.from_pretrained(model_id, subfolder="vae", use_safetensors=True)
tokenizer = CLIPTokenizer.from_pretrained(model_id, subfolder="tokenizer")
text_encoder = CLIPTextModel.from_pretrained(model_id, subfolder="text_encoder", use_safetensors=True)
unet = UNet2DConditionModel.from_pretrained(model_id, subfolder="unet", use_safetensors=True)
scheduler = UniPCMultistepScheduler.from_pretrained(model_id, subfolder="scheduler")

prompt = ["a photograph of the red heart"]
height = width = 64
num_inference_steps, guidance_scale = 5, 7.5
generator = torch.manual_seed(0)
batch_size = len(prompt)

text_input = tokenizer(
    prompt, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
)
with torch.no_grad():
    text_embeddings = text_encoder(text_input["input_ids"].to("cpu"))[0]
max_length = text_input.input_ids.shape[-1]
uncond_input = tokenizer([""] * batch_size, padding="max_length", max_length=max_length, return_tensors="pt")
with torch.no_grad():
    uncond_embeddings = text_encoder(uncond_input.input_ids)[0]
text_embeddings = torch.cat([uncond_embeddings, text_embeddings])

latents = torch.randn((batch_size, unet.config.in_channels, height // 8, width // 8), generator=generator)
latents = latents * scheduler.init_noise_sigma
scheduler.set_timesteps(num_inference_steps)
for t in scheduler.timesteps:
    latent_model_input = torch.cat([latents] * 2)
    latent_model_input = scheduler.scale_model_input(latent_model_input, timestep=t)
    with torch.no_grad():
        noise_pred = unet(latent_model_input, t, encoder_hidden_states=text_embeddings)["sample"]
    noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
    noise_pred = noise_pred_uncond + guidance_scale * (noise_pred_text - noise_pred_uncond)
    latents = scheduler.step(noise_pred, t, latents)["prev_sample"]

latents = 1 / vae.config.scaling_factor * latents
with torch.no_grad():
    image = vae.decode(latents).sample
image = (image / 2 + 0.5).clamp(0, 1).squeeze()
result = image.permute(1, 2, 0).numpy()
image = Image.fromarray((result * 255).round().astype("uint8"))
"""

EULER_LOOP = """
import torch
from diffusers import StableDiffusionPipeline, EulerDiscreteScheduler

pipe = StableDiffusionPipeline.from_pretrained(model_id)
scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
prompt_embeds, negative_prompt_embeds = pipe.encode_prompt("a cat", pipe.device, 1, True, negative_prompt="dog")
embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
scheduler.set_timesteps(4, device=pipe.device)
latents = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(3)) * scheduler.init_noise_sigma.to(pipe.device)
print(scheduler.init_noise_sigma.item())
with pipe.progress_bar(total=4) as progress_bar, torch.no_grad():
    for i, t in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(torch.cat([latents] * 2), t)
        noise = pipe.unet(model_input, t, encoder_hidden_states=embeds, return_dict=False)[0]
        uncond, text = noise.chunk(2)
        latents, *_ = scheduler.step(uncond + 7.5 * (text - uncond), t, latents).to_tuple()
        progress_bar.update()
    image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
drawn = pipe.image_processor.postprocess(image, output_type="pil", do_denormalize=[True] * image.shape[0])[0]
result = pipe.image_processor.postprocess(image, output_type="np")
assert pipe.numpy_to_pil(result)[0].tobytes() == drawn.tobytes()
"""

EMBEDDINGS = """
import torch
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained(model_id)
prompt = "the red heart of a cat " * 12
max_length = pipe.tokenizer.model_max_length
input_ids = pipe.tokenizer(prompt, return_tensors="pt").input_ids
shape_max_length = input_ids.shape[-1]
assert shape_max_length > max_length
negative_ids = pipe.tokenizer(
    "dog", truncation=False, padding="max_length", max_length=shape_max_length, return_tensors="pt"
).input_ids
concat_embeds, neg_embeds = [], []
for i in range(0, shape_max_length - max_length, max_length):
    concat_embeds.append(pipe.text_encoder(input_ids[:, i : i + max_length])[0])
    neg_embeds.append(pipe.text_encoder(negative_ids[:, i : i + max_length])[0])
prompt_embeds = torch.cat(concat_embeds, dim=1)
negative_prompt_embeds = torch.cat(neg_embeds, dim=1)
removed = pipe.tokenizer.batch_decode(input_ids[:, max_length - 1 : -1])
assert len(pipe.tokenizer(prompt)["input_ids"]) == shape_max_length and removed[0]
result = pipe(
    prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds, num_inference_steps=3,
    generator=torch.manual_seed(0), output_type="np",
).images
"""

IMAGE_TO_IMAGE = """
import numpy as np
import torch
from PIL import Image
from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image
from diffusers.utils import load_image, make_image_grid

pipeline = AutoPipelineForText2Image.from_pretrained(model_id, torch_dtype=torch.float32)
first = pipeline("a cat", num_inference_steps=3, generator=torch.manual_seed(0), height=64, width=64).images[0]
first.save(folder + "/first.png")
init_image = load_image(folder + "/first.png").resize((64, 64))
pipeline = AutoPipelineForImage2Image.from_pipe(pipeline)
pipeline.enable_xformers_memory_efficient_attention() if enable_xformers else None
images = pipeline(
    prompt=["a dog", "a red heart"], image=init_image, strength=0.75, guidance_scale=7.5, num_inference_steps=5,
    generator=[torch.Generator().manual_seed(i) for i in range(2)],
).images
grid = make_image_grid([init_image, *images], rows=1, cols=3)
assert grid.size == (192, 64)
result = np.stack([np.asarray(image) / 255 for image in images])
"""

BATCH = """
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid

pipeline = DiffusionPipeline.from_pretrained(model_id, use_safetensors=True)
pipeline.enable_attention_slicing()

def get_inputs(batch_size=1):
    generator = [torch.Generator("cpu").manual_seed(i) for i in range(batch_size)]
    prompts = batch_size * ["a cat"]
    return {"prompt": prompts, "generator": generator, "num_inference_steps": 3}

pipeline.vae.enable_slicing()
images = pipeline(**get_inputs(batch_size=3)).images
make_image_grid(images, 1, 3)
result = np.stack([np.asarray(image) / 255 for image in images])
images, has_nsfw = pipeline(**get_inputs(), return_dict=False)
assert has_nsfw is None
"""

SAVE_AND_LOAD = """
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained(model_id, safety_checker=None, low_cpu_mem_usage=True)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
pipe.save_pretrained(folder + "/mine", safe_serialization=True)
again = StableDiffusionPipeline.from_pretrained(folder + "/mine", local_files_only=True)
assert again.scheduler.config.algorithm_type == "dpmsolver++"
assert again.config["unet"][1] == "UNet2DConditionModel" and again.safety_checker is None
assert set(again.components) == set(pipe.components)
image2image = StableDiffusionImg2ImgPipeline(**again.components, requires_safety_checker=False)
assert image2image.unet is again.unet
print(again.unet.num_parameters(), dict(again.scheduler.config)["num_train_timesteps"])
result = again("a cat", num_inference_steps=4, generator=torch.manual_seed(33), output_type="np").images
"""

TRAINING = """
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

noise_scheduler = DDPMScheduler.from_pretrained(model_id, subfolder="scheduler")
vae = AutoencoderKL.from_pretrained(model_id, subfolder="vae")
unet = UNet2DConditionModel.from_pretrained(model_id, subfolder="unet")
vae.requires_grad_(False)
unet.enable_gradient_checkpointing()
unet.train()
optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
generator = torch.manual_seed(0)
losses = []
for step in range(3):
    pixels = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    latents = vae.encode(pixels).latent_dist.sample(generator) * vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (2,), generator=generator).long()
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    states = torch.randn(2, 20, unet.config.cross_attention_dim, generator=generator)
    target = noise_scheduler.get_velocity(latents, noise, timesteps) if step == 2 else noise
    model_pred = unet(noisy_latents, timesteps, states, return_dict=False)[0]
    loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
    loss.backward()
    torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
unet.disable_gradient_checkpointing()
unet.save_pretrained(folder + "/unet")
result = losses
"""

AYS = """
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.schedulers import AysSchedules

sampling_schedule = AysSchedules["StableDiffusionTimesteps"]
pipe = StableDiffusionPipeline.from_pretrained(model_id)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type="dpmsolver++")
result = pipe("a cat", timesteps=sampling_schedule, generator=torch.manual_seed(0), output_type="np").images
"""

PREDICTED = """
import torch
from diffusers import LMSDiscreteScheduler, StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained(model_id)
scheduler = LMSDiscreteScheduler.from_config(pipe.scheduler.config)
tokenizer, text_encoder, unet = pipe.tokenizer, pipe.text_encoder, pipe.unet

def embed(texts):
    inputs = tokenizer(
        texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        return text_encoder(inputs.input_ids.to(text_encoder.device))[0].to(text_encoder.dtype)

embeddings = torch.cat([embed([""]), embed(["a red heart"])])
scheduler.set_timesteps(6, device=unet.device)
latents = torch.randn((1, unet.config.in_channels, 8, 8), generator=torch.manual_seed(32)) * scheduler.init_noise_sigma
result = []
for i, t in enumerate(scheduler.timesteps):
    inputs = scheduler.scale_model_input(torch.cat([latents] * 2), t)
    with torch.no_grad():
        noise_pred = unet(
            inputs,
            t,
            encoder_hidden_states=embeddings,
            timestep_cond=None,
            cross_attention_kwargs=None,
            added_cond_kwargs=None,
            return_dict=False,
        )[0]
    uncond, text = noise_pred.chunk(2)
    noise_pred = uncond + 7.5 * (text - uncond)
    predicted = latents - scheduler.sigmas[i] * noise_pred
    out = scheduler.step(noise_pred, t, latents)
    assert torch.allclose(out.pred_original_sample, predicted, atol=1e-3)
    latents = out.prev_sample
    result.append(latents.numpy())
"""

SCRIPTS = {name.lower(): text for name, text in [*globals().items()] if name.isupper() and isinstance(text, str)}


def run(script: str, library, model_id: str, folder, parts) -> dict:
    names = {"model_id": model_id, "folder": str(folder), "enable_xformers": library is sfumato, **vars(parts)}
    exec(compile(script.replace("from diffusers", f"from {library.__name__}"), "script", "exec"), names)
    return names


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_draws_the_same(name, checkpoints, tmp_path, caplog):
    import transformers

    torch.manual_seed(0)
    found = []
    for library, words in ((sfumato, sfumato), (diffusers, transformers)):
        (tmp_path / library.__name__).mkdir()
        parts = SimpleNamespace(CLIPTextModel=words.CLIPTextModel, CLIPTokenizer=words.CLIPTokenizer)
        names = run(SCRIPTS[name], library, str(checkpoints()), tmp_path / library.__name__, parts)
        found.append(np.asarray(names["result"], dtype=np.float64))
    own, theirs = found
    assert own.shape == theirs.shape
    # PIL images are rounded to 8 bits, so that a pixel may fall to either side.
    rounded = "/ 255" in SCRIPTS[name]
    assert np.abs(own - theirs).max() <= (1.01 / 255 if rounded else FLOAT32 * np.abs(theirs).max())
