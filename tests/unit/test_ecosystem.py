"""Names of the ecosystem: those that are not here answer with a sentence, the others mean what they say."""

from __future__ import annotations

import copy
import json
import logging
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato import image_processor, schedulers, utils
from sfumato.ecosystem import table
from sfumato.errors import ConfigError, DownloadError, NotHere, SfumatoError, UnknownArgument, UsageError
from sfumato.image_processor import VaeImageProcessor
from sfumato.models import attention_processor
from sfumato.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from sfumato.utils.torch_utils import randn_tensor

EXACT = {where: [name for name in names if "*" not in name and "?" not in name] for where, names in table().items()}


# ---- what is not here ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT["package"])
def test_the_package_answers(name):
    assert not hasattr(sfumato, name), f"{name} is here now: take it out of ecosystem.toml"
    with pytest.raises(NotHere, match=f"^{name} .* is not in Sfumato; "):
        getattr(sfumato, name)
    with pytest.raises(ImportError, match=f"^{name} .* is not in Sfumato; "):
        exec(f"from sfumato import {name}")


def test_patterns_stand_for_names():
    with pytest.raises(ImportError, match=r"FluxPipeline .a pipeline of another model family. is not in Sfumato; "):
        from sfumato import FluxPipeline  # noqa: F401
    with pytest.raises(ImportError, match="ControlNet in another form"):
        from sfumato import StableDiffusionControlNetXSPipeline  # noqa: F401


@pytest.mark.parametrize(
    "line",
    [
        "from sfumato.models import AsymmetricAutoencoderKL",
        "from sfumato.pipelines import StableDiffusion3Pipeline",
        "from sfumato.schedulers import FlowMatchEulerDiscreteScheduler",
        "from sfumato.schedulers import KarrasDiffusionSchedulers",
        "from sfumato.utils import export_to_video",
        "from sfumato.optimization import get_scheduler",
        "from sfumato.optimization import get_cosine_schedule_with_warmup",
        "from sfumato.optimization import SchedulerType",
    ],
)
def test_rooms_of_the_package_answer(line):
    with pytest.raises(ImportError, match=rf"^{line.split()[-1]} .* is not in Sfumato; "):
        exec(line)


@pytest.mark.parametrize("owner", [attention_processor, image_processor])
@pytest.mark.parametrize("name", ["LoRAAttnProcessor", "VaeImageProcessorLDM3D"])
def test_modules_answer_as_attributes(owner, name):
    """Python itself says what is wrong with `from module import name`, where the module is no package."""
    with pytest.raises(NotHere, match=f"^{name} .* is not in Sfumato; "):
        getattr(owner, name)


def test_what_nobody_has_is_python_s_own_error():
    with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
        from sfumato import nonsense  # noqa: F401
    for owner in (sfumato, utils, schedulers.DDIMScheduler()):
        with pytest.raises(AttributeError, match="has no attribute 'nonsense'") as caught:
            owner.nonsense  # noqa: B018
        assert not isinstance(caught.value, SfumatoError)


@pytest.mark.parametrize("name", EXACT["pipeline"])
@pytest.mark.parametrize("shape", ["sd15", "sdxl"])
def test_pipelines_answer(name, shape, ours):
    pipe = ours(shape)
    assert not hasattr(pipe, name)
    with pytest.raises(NotHere, match=f"^{name} .* is not in Sfumato; "):
        getattr(pipe, name)


@pytest.mark.parametrize("name", EXACT["part"])
def test_parts_answer(name, ours):
    pipe = ours()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.scheduler, pipe.tokenizer):
        assert not hasattr(part, name)
        with pytest.raises(NotHere, match=f"^{name} .* is not in Sfumato; "):
            getattr(part, name)


def test_helpers_answer():
    for where, module in (("utils", utils), ("logging", utils.logging)):
        for name in EXACT[where]:
            assert not hasattr(module, name)
    with pytest.raises(ImportError):
        from sfumato.utils import export_to_video  # noqa: F401
    with pytest.raises(NotHere, match="use export_to_gif"):
        utils.export_to_video  # noqa: B018


def test_special_names_are_left_to_python(ours):
    pipe = ours()
    assert copy.copy(pipe).parts is pipe.parts
    assert not hasattr(pipe, "__array__")


# ---- configs are dicts, outputs are mappings -------------------------------------------------------------------------


def test_a_config_is_the_dict_it_came_from(ours):
    config = ours().unet.config
    told = config.to_dict()
    assert isinstance(config, dict)
    assert config == told
    assert told == config
    assert dict(config) == {**config} == told
    assert json.loads(json.dumps(config)) == json.loads(json.dumps(told))
    assert config["block_out_channels"] == list(config.block_out_channels)
    assert config.get("no such key") is None
    for change in (lambda: config.update(x=1), lambda: config.pop("in_channels"), lambda: config.__setitem__("x", 1)):
        with pytest.raises(UsageError, match="read-only"):
            change()
    again = copy.deepcopy(config)
    assert again == config
    assert again.in_channels == config.in_channels
    assert pickle.loads(pickle.dumps(config)) == config


def test_outputs_are_read_in_three_ways(ours):
    pipe = ours()
    states = torch.zeros(1, 20, pipe.unet.config.cross_attention_dim)
    with torch.no_grad():
        out = pipe.unet(torch.zeros(1, 4, 8, 8), 5, states)
    assert out["sample"] is out.sample is out[0] is out[:1][0]
    assert list(out) == list(out.keys()) == ["sample"]
    assert out.to_tuple() == (out.sample,)
    assert isinstance(out, dict)
    assert "sample" in out
    drawn = pipe("a cat", num_inference_steps=1)
    assert drawn["images"] is drawn.images is drawn[0]
    assert list(drawn) == ["images"]
    assert pipe("a cat", num_inference_steps=1, return_dict=False)[1] is None
    pickled = pickle.loads(pickle.dumps(out))
    assert torch.equal(pickled.sample, pickled["sample"])


# ---- schedulers ----------------------------------------------------------------------------------------------------


def test_configs_are_saved_and_loaded_by_either_name(tmp_path):
    scheduler = schedulers.DDIMScheduler(steps_offset=1)
    scheduler.save_config(tmp_path)
    config = schedulers.DDIMScheduler.load_config(tmp_path)
    assert config["steps_offset"] == 1
    assert (
        schedulers.DDIMScheduler.from_config(config).config == schedulers.DDIMScheduler.from_pretrained(tmp_path).config
    )
    again, rest = schedulers.DDIMScheduler.from_config(config, return_unused_kwargs=True, foreign=2)
    assert rest["foreign"] == again.config["foreign"] == 2
    assert schedulers.DDIMScheduler.load_config(tmp_path, return_unused_kwargs=True, x=1)[1] == {"x": 1}


def test_older_code_reads_the_config_as_attributes(ours):
    scheduler = ours().scheduler
    with pytest.warns(FutureWarning, match=r"config.num_train_timesteps; read it there"):
        assert scheduler.num_train_timesteps == 1000
    with pytest.warns(FutureWarning, match=r"UNet2DConditionModel.config.in_channels"):
        assert ours().unet.in_channels == 4
    scheduler.register_to_config(steps_offset=3, of_mine="x")
    assert (scheduler.config.steps_offset, scheduler.config["of_mine"]) == (3, "x")


VE = [
    name
    for name in schedulers.__all__
    if name.endswith("Scheduler") and name != "Scheduler" and not getattr(schedulers, name).needs_grid
]


@pytest.mark.parametrize("name", VE)
def test_sigma_schedulers_step_over_all_training_timesteps(name):
    scheduler = getattr(schedulers, name)()
    x = torch.randn(1, 4, 8, 8)
    t = scheduler.timesteps[0]
    assert scheduler.scale_model_input(x, t).shape == x.shape
    assert scheduler.step(x, t, x).prev_sample.isfinite().all()
    assert scheduler.num_inference_steps is None
    scheduler.set_timesteps(5)
    assert len(scheduler.timesteps) in (5, 9)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"])
def test_the_first_spread_is_a_number_that_moves(name):
    scheduler = getattr(schedulers, name)()
    scheduler.set_timesteps(5)
    spread = scheduler.init_noise_sigma
    assert spread.ndim == 0
    assert spread.to("cpu").item() == pytest.approx(float(scheduler.sigmas.max()))
    assert (torch.ones(2, dtype=torch.float16) * spread).dtype == torch.float16


def test_schedules_of_ten_steps(ours):
    steps = schedulers.AysSchedules["StableDiffusionTimesteps"]
    assert steps[0] == 999
    pipe = ours()
    pipe.scheduler = schedulers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    seen = []
    pipe("a cat", timesteps=steps, callback_on_step_end=lambda pipe, i, t, kw: seen.append(int(t)) or {})
    assert seen == steps
    assert len(schedulers.AysSchedules["StableDiffusionXLSigmas"]) == 11


# ---- models --------------------------------------------------------------------------------------------------------


def test_how_many_parameters(checkpoints):
    pipe = sfumato.StableDiffusionPipeline.from_pretrained(checkpoints())
    unet, encoder = pipe.unet, pipe.text_encoder
    every = sum(p.numel() for p in unet.parameters())
    assert unet.num_parameters() == every
    pipe("a cat", num_inference_steps=1)  # and packed for the CPU
    assert unet.num_parameters() == unet.num_parameters(exclude_embeddings=True) == every
    words = encoder.text_model.embeddings.token_embedding.weight.numel()
    places = encoder.text_model.embeddings.position_embedding.weight.numel()
    assert encoder.num_parameters() - encoder.num_parameters(exclude_embeddings=True) == words + places
    assert unet.num_parameters(only_trainable=True) == sum(p.numel() for p in unet.parameters() if p.requires_grad)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_gradient_checkpointing_changes_no_gradient(part, ours):
    model = copy.deepcopy(getattr(ours(), part))
    torch.manual_seed(0)
    width = ours().unet.config.cross_attention_dim
    call = {
        "unet": (torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 20, width)),
        "vae": (torch.randn(1, 3, 16, 16),),
        "text_encoder": (torch.arange(20)[None],),
    }[part]

    def gradients():
        model.zero_grad()
        model(*call)[0].square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    assert copy.deepcopy(model).is_gradient_checkpointing
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b)
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


def test_gradient_checkpointing_recomputes(ours):
    unet = copy.deepcopy(ours().unet)
    calls = []
    layer = unet.down_blocks[0].resnets[0]
    layer.norm1.register_forward_hook(lambda *_: calls.append(1))
    unet.enable_gradient_checkpointing()
    x = torch.randn(1, 4, 8, 8)
    unet(x, 1, torch.randn(1, 20, unet.config.cross_attention_dim)).sample.mean().backward()
    assert len(calls) == 2


def test_attention_processors(ours):
    unet = ours().unet
    processors = unet.attn_processors
    assert "mid_block.attentions.0.transformer_blocks.0.attn1.processor" in processors
    unet.set_attn_processor(processors)
    unet.set_attn_processor(AttnProcessor2_0())
    assert {type(one) for one in unet.attn_processors.values()} == {AttnProcessor2_0}
    unet.set_attn_processor(dict.fromkeys(processors, XFormersAttnProcessor(attention_op=None)))
    assert {type(one) for one in unet.attn_processors.values()} == {XFormersAttnProcessor}
    unet.set_default_attn_processor()
    assert {type(one) for one in unet.attn_processors.values()} == {AttnProcessor}
    with pytest.raises(UsageError, match="got 1 processors for "):
        unet.set_attn_processor({"x": AttnProcessor()})

    class Mine:
        def __call__(self, *_):
            raise AssertionError

    with pytest.raises(UsageError, match=r"'Mine', are not supported; .* use model.set_attention"):
        unet.set_attn_processor(Mine())


def test_models_say_and_save_their_config(ours, tmp_path):
    unet = ours().unet
    unet.save_config(tmp_path)
    config = sfumato.UNet2DConditionModel.load_config(tmp_path)
    assert config["_class_name"] == "UNet2DConditionModel"
    assert sfumato.UNet2DConditionModel.from_config(config).config.to_dict().items() >= unet.config.to_dict().items()


def test_both_autoencoders_encode_and_decode_in_one_call(ours):
    vae, tiny = ours().vae, sfumato.AutoencoderTiny()
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        mode = vae(x).sample
        drawn = vae(x, sample_posterior=True, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
        again = vae(x, sample_posterior=True, generator=torch.Generator().manual_seed(0))["sample"]
        assert torch.equal(drawn, again)
        assert not torch.equal(drawn, mode)
        assert tiny(x, return_dict=False)[0].shape == x.shape


# ---- loading and saving ----------------------------------------------------------------------------------------------


def test_arguments_that_ask_for_what_is_done_anyway(checkpoints, tmp_path):
    folder = checkpoints()
    how = {"low_cpu_mem_usage": True, "offload_folder": "x", "trust_remote_code": False, "resume_download": None}
    pipe = sfumato.StableDiffusionPipeline.from_pretrained(folder, device_map="balanced", **how)
    unet = sfumato.UNet2DConditionModel.from_pretrained(folder, subfolder="unet", device_map={"": "cpu"}, **how)
    pipe.save_pretrained(tmp_path / "all", safe_serialization=True)
    unet.save_pretrained(tmp_path / "unet", safe_serialization=True)
    assert (tmp_path / "all" / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({"device_map": {"unet": "cpu", "vae": "cpu"}}, "a pipeline uses one device"),
        ({"trust_remote_code": True}, "code in a checkpoint is never run"),
        ({"custom_pipeline": "x"}, "custom pipelines"),
        ({"quantization_config": {}}, "use torch_dtype to choose"),
        ({"device_map": "cupboard"}, "cupboard"),
    ],
)
def test_arguments_that_ask_for_more_are_refused(keywords, says, checkpoints):
    with pytest.raises(UsageError, match=says):
        sfumato.DiffusionPipeline.from_pretrained(checkpoints(), **keywords)


def test_nothing_is_saved_as_a_pickle(ours, tmp_path, caplog):
    for name, thing in (("pipeline", ours()), ("unet", ours().unet)):
        caplog.clear()
        thing.save_pretrained(tmp_path / name, safe_serialization=False)
        assert "always saved as safetensors" in caplog.text
        type(thing).from_pretrained(tmp_path / name)
    assert not list(tmp_path.rglob("*.bin"))


def test_a_download_says_where_the_folder_is(checkpoints, no_network):
    assert sfumato.DiffusionPipeline.download(checkpoints()) == str(checkpoints())
    with pytest.raises(UnknownArgument, match="download has no argument 'nonsense'"):
        sfumato.DiffusionPipeline.download(checkpoints(), nonsense=1)


# ---- helpers -------------------------------------------------------------------------------------------------------


def test_images_to_tensors_and_back():
    processor = VaeImageProcessor()
    picture = Image.fromarray(np.arange(20 * 17 * 3, dtype=np.uint8).reshape(20, 17, 3))
    pixels = processor.preprocess(picture)
    assert pixels.shape == (1, 3, 16, 16)
    assert processor.preprocess(picture, height=24, width=32).shape == (1, 3, 24, 32)
    assert processor.preprocess([picture, picture]).shape[0] == 2
    assert -1 <= pixels.min() < 0 < pixels.max() <= 1
    assert processor.postprocess(pixels, "latent") is pixels
    assert processor.postprocess(pixels, "np").shape == (1, 16, 16, 3)
    assert processor.postprocess(pixels)[0].size == (16, 16)
    assert VaeImageProcessor(do_normalize=False).preprocess(picture).min() >= 0
    raw = processor.postprocess(torch.cat([pixels, pixels]), "pt", do_denormalize=[True, False])
    assert torch.equal(raw[1], pixels[0])
    with pytest.raises(UsageError, match=r"no output_type 'pill' .did you mean 'pil'"):
        processor.postprocess(pixels, "pill")
    array = processor.pil_to_numpy(picture)
    assert torch.equal(processor.numpy_to_pt(array), torch.from_numpy(array).permute(0, 3, 1, 2))
    assert np.array_equal(processor.pt_to_numpy(processor.numpy_to_pt(array)), array)
    for back in (processor.numpy_to_pil(array), utils.numpy_to_pil(array[0])):
        assert back[0].tobytes() == picture.tobytes()
    assert utils.pt_to_pil(processor.normalize(processor.numpy_to_pt(array)))[0].tobytes() == picture.tobytes()


def test_images_of_files(tmp_path, no_network):
    picture = Image.new("RGBA", (8, 4), (10, 20, 30, 255))
    picture.save(tmp_path / "x.png")
    for source in (tmp_path / "x.png", str(tmp_path / "x.png"), picture):
        assert utils.load_image(source).getpixel((0, 0)) == (10, 20, 30)
    assert utils.load_image(picture, lambda one: one.convert("L")).mode == "L"
    with pytest.raises(UsageError, match=r"nope.png"):
        utils.load_image(tmp_path / "nope.png")


def test_images_of_addresses(monkeypatch, tmp_path):
    (tmp_path / "x.png").parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 4), (10, 20, 30)).save(tmp_path / "x.png")
    (tmp_path / "x.txt").write_text("not an image")
    monkeypatch.setattr(
        "sfumato.utils.files.urlopen",
        lambda request, timeout: (tmp_path / request.full_url.rpartition("/")[2]).open("rb"),
    )
    assert utils.load_image("https://images.test/x.png").size == (8, 4)
    with pytest.raises(UsageError, match=r"https://images.test/x.txt"):
        utils.load_image("https://images.test/x.txt")
    with pytest.raises(DownloadError, match=r"https://images.test/nope.png cannot be fetched"):
        utils.load_image("https://images.test/nope.png")


def test_animations(tmp_path):
    frames = [Image.new("RGB", (8, 8), (i * 80, 0, 0)) for i in range(3)]
    path = utils.export_to_gif(frames, tmp_path / "x.gif", fps=5)
    with Image.open(path) as gif:
        assert (gif.n_frames, gif.info["duration"]) == (3, 200)
    with Image.open(utils.export_to_gif(frames)) as gif:
        assert gif.n_frames == 3
    with pytest.raises(UsageError, match="list of PIL images"):
        utils.export_to_gif([], tmp_path / "y.gif")


def test_random_numbers_as_pipelines_draw_them():
    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    shape = (2, 4, 8, 8)
    assert torch.equal(randn_tensor(shape, seeded(0)), torch.randn(shape, generator=seeded(0)))
    both = randn_tensor(shape, [seeded(0), seeded(1)], device="cpu", dtype=torch.float16)
    assert torch.equal(both[1:], torch.randn((1, *shape[1:]), generator=seeded(1)).half())


def test_how_much_is_said():
    log = logging.getLogger("sfumato")
    level, handlers = log.level, list(log.handlers)
    try:
        utils.logging.set_verbosity_error()
        assert utils.logging.get_verbosity() == logging.ERROR
        utils.logging.set_verbosity_info()
        assert utils.logging.get_verbosity() == logging.INFO
        assert utils.logging.get_logger() is utils.get_logger() is log
        assert utils.logging.get_logger("mine").name == "mine"
    finally:
        log.setLevel(level)
        log.handlers[:] = handlers


def test_modules_are_there_without_an_import_of_their_own(server, tmp_path):
    code = "import sfumato; print(sfumato.utils.make_image_grid, sfumato.image_processor.VaeImageProcessor)"
    done = server.run(code, [], cwd=tmp_path)
    assert done.code == 0, done.err


def test_a_wrong_value_in_a_config_names_its_file(tmp_path):
    (tmp_path / "scheduler_config.json").write_text('{"num_train_timesteps": "x"}')
    with pytest.raises(ConfigError, match=r"scheduler_config.json: .*num_train_timesteps"):
        schedulers.DDIMScheduler.from_pretrained(tmp_path)
