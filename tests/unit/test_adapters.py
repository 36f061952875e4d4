"""Adapters of every dialect on small networks: what is applied, taken off again, refused, reported and repeated."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import sfumato
from sfumato.adapters import files
from sfumato.adapters.about import about_adapter, is_adapter
from sfumato.adapters.adapter import read_adapter
from sfumato.adapters.named import find_adapter, hashes_to, moved, with_named_adapters
from sfumato.adapters.outfit import Worn, kept_bytes, wear
from sfumato.checkpoints.rules import original_name, unet_names
from sfumato.errors import CheckpointError, UsageError
from sfumato.kernels import CompilerError, kernels_for
from sfumato.metadata.a1111 import parameters, parse
from sfumato.models.packed import is_packed, pack
from sfumato.pipelines.block_weights import weights_from
from sfumato.request import AdapterFile, EmbeddingFile, GenerateRequest
from support.adapters import kohya, lora, random_lora


def original_path(path, config):
    return original_name(f"{path}.", unet_names(config))[0].removesuffix(".")


@pytest.fixture
def nets(checkpoints):
    return loaded(checkpoints())


@pytest.fixture
def xl(checkpoints):
    return loaded(checkpoints("sdxl"))


def loaded(folder):
    """The networks of a checkpoint, which nobody has drawn with and packed."""
    return sfumato.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32).parts.adaptable


def weights_of(nets):
    return {f"{role}.{name}": one.clone() for role, net in nets.items() for name, one in net.state_dict().items()}


def merged(nets, state, metadata=None, strength=1.0, **options):
    """The weights that change, by name, with what a file of these tensors does; the networks are as before afterwards."""
    before = weights_of(nets)
    adapter = read_adapter(files.Stored(state, metadata or {}, sha256=str(id(state))), nets, **options)
    for role, net in nets.items():
        wear(net, role, [Worn(adapter, strength)])
    after = weights_of(nets)
    for role, net in nets.items():
        wear(net, role, [])
    assert all(torch.equal(one, before[name]) for name, one in weights_of(nets).items())
    return {name: one for name, one in after.items() if not torch.equal(one, before[name])}


def expected(nets, modules, strength=1.0):
    """What kohya's convention says: W + m alpha / rank up down."""
    found = {}
    for name, parts in modules.items():
        role, _, path = name.partition(".")
        weight = nets[role].get_submodule(path).weight.detach()
        down, up = parts["lora_down.weight"], parts["lora_up.weight"]
        scale = float(parts["alpha"]) / down.shape[0] if "alpha" in parts else 1.0
        found[f"{name}.weight"] = weight + strength * scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return found


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        torch.testing.assert_close(found[name], one, atol=1e-6, rtol=1e-6, msg=name)


def renamed(modules, name):
    """The tensors of modules under the names of one dialect."""
    state = {}
    for module, parts in modules.items():
        role, _, path = module.partition(".")
        down, up = parts["lora_down.weight"], parts["lora_up.weight"]
        short = path.removeprefix("text_model.")
        old = path.replace("to_out.0", "to_out")
        spellings = {
            "diffusers": (f"{module}.lora.down.weight", f"{module}.lora.up.weight"),
            "linear layer": (f"{module}.lora_linear_layer.down.weight", f"{module}.lora_linear_layer.up.weight"),
            "peft": (f"{module}.lora_A.weight", f"{module}.lora_B.weight"),
            "peft, flat text encoder": (f"{role}.{short}.lora_A.weight", f"{role}.{short}.lora_B.weight"),
            "peft, named": (f"{module}.lora_A.default.weight", f"{module}.lora_B.default.weight"),
            "raw peft": (f"{role}.base_model.model.{path}.lora_A.weight", f"{role}.base_model.model.{path}.lora_B.weight"),
            "lycoris": (f"lycoris_{'te_' if role != 'unet' else ''}{path.replace('.', '_')}.lora_down.weight", f"lycoris_{'te_' if role != 'unet' else ''}{path.replace('.', '_')}.lora_up.weight"),
        }  # fmt: skip
        if name == "first":
            where, _, layer = old.rpartition(".")
            if role != "unet":
                layer = f"to_{layer.removesuffix('_proj')}"
            processor = ".processor" if role == "unet" else ""
            keys = tuple(f"{role}.{where}{processor}.{layer}_lora.{part}.weight" for part in ("down", "up"))
        else:
            keys = spellings[name]
        state[keys[0]], state[keys[1]] = down, up
    return state


DIALECTS = (
    "diffusers",
    "linear layer",
    "peft",
    "peft, flat text encoder",
    "peft, named",
    "raw peft",
    "lycoris",
    "first",
)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_means_the_same_modules(nets, dialect):
    modules = random_lora(nets, alpha=None)
    assert_same(merged(nets, renamed(modules, dialect), strength=-1.3), expected(nets, modules, -1.3))


def test_kohyas_names_with_alphas_and_convolutions(nets):
    modules = random_lora(nets, convolutions=True)
    assert_same(merged(nets, kohya(modules), strength=2.5), expected(nets, modules, 2.5))


@pytest.mark.parametrize("beginning", ["lora_unet_", "diffusion_model.", "model.diffusion_model."])
def test_original_names_of_sdxl(xl, beginning):
    modules = random_lora({"unet": xl["unet"]}, convolutions=True)
    state = {}
    for module, parts in modules.items():
        name = beginning + original_path(module.removeprefix("unet."), xl["unet"].config)
        assert name != beginning + module.removeprefix("unet.")
        name = name if beginning.endswith(".") else name.replace(".", "_")
        state |= {f"{name}.{part}": one for part, one in parts.items()}
    assert_same(merged(xl, state), expected(xl, modules))


def test_original_names_are_those_that_are_published(ours):
    config = ours().unet.config
    assert original_path("mid_block.resnets.1.conv2", config) == "middle_block.2.out_layers.3"
    assert original_path("down_blocks.0.downsamplers.0.conv", config) == "input_blocks.2.0.op"  # one layer a block here
    assert original_path("up_blocks.0.upsamplers.0.conv", config) == "output_blocks.1.1.conv"
    assert original_path("up_blocks.1.upsamplers.0.conv", config) == "output_blocks.3.2.conv"


def test_both_text_encoders_of_sdxl(xl):
    modules = random_lora({role: xl[role] for role in ("text_encoder", "text_encoder_2")})
    modules["text_encoder_2.text_projection"] = lora(xl["text_encoder_2"].text_projection.weight.shape)
    state = {key.replace("lora_te_", "lora_te1_"): one for key, one in kohya(modules).items()}
    assert_same(merged(xl, state), expected(xl, modules))
    comfy = {"text_encoder": "text_encoders.clip_l.transformer", "text_encoder_2": "text_encoders.clip_g.transformer"}
    state = {}
    for module, parts in modules.items():
        role, _, path = module.partition(".")
        state |= {f"{comfy[role]}.{path}.{part}": one for part, one in parts.items()}
    assert_same(merged(xl, state), expected(xl, modules))


def test_settings_of_the_peft_library_in_the_metadata(nets):
    modules = random_lora({"unet": nets["unet"]}, alpha=None)
    named = next(iter(modules))
    told = {"unet.r": 4, "unet.lora_alpha": 8, "unet.use_rslora": True}
    told["unet.alpha_pattern"] = {named.removeprefix("unet."): 3}
    for module, parts in modules.items():
        rank = parts["lora_down.weight"].shape[0]
        parts["alpha"] = torch.tensor(
            (3 if module == named else 8) * rank**0.5
        )  # alpha / sqrt(rank), said as alpha / rank
    state = renamed(modules, "peft")
    found = merged(nets, state, {"lora_adapter_metadata": json.dumps(told)})
    assert_same(found, expected(nets, modules))


def test_numbered_layers_in_the_order_of_the_first_library(nets):
    order = []
    for way in ("down_blocks", "up_blocks", "mid_block"):
        blocks = [
            name
            for name, _ in nets["unet"].named_modules()
            if name.startswith(way) and name.endswith(("transformer_blocks.0",))
        ]
        for block in blocks:
            for layer in (
                "attn1.to_q",
                "attn1.to_k",
                "attn1.to_v",
                "attn1.to_out.0",
                "ff.net.0.proj",
                "attn2.to_q",
                "attn2.to_k",
                "attn2.to_v",
                "attn2.to_out.0",
            ):
                order.append(f"{block}.{layer}")
    modules = {
        f"unet.{path}": lora(nets["unet"].get_submodule(path).weight.shape, 2, None, number)
        for number, path in enumerate(order)
    }
    state = {}
    for number, parts in enumerate(modules.values()):
        state |= {f"unet:{number}:down": parts["lora_down.weight"], f"unet:{number}:up": parts["lora_up.weight"]}
    told = {"unet": json.dumps(["CrossAttention", "Attention", "GEGLU"])}
    assert_same(merged(nets, state, told), expected(nets, modules))


def test_norms_biases_and_whole_differences(nets):
    net = nets["unet"]
    state = {
        "lora_unet_down_blocks_0_resnets_0_norm1.w_norm": torch.randn(16),
        "lora_unet_down_blocks_0_resnets_0_norm1.b_norm": torch.randn(16),
        "lora_unet_conv_in.diff": torch.randn(net.conv_in.weight.shape),
        "lora_unet_conv_in.diff_b": torch.randn(16),
    }
    found = merged(nets, state, strength=0.5)
    norm = net.get_submodule("down_blocks.0.resnets.0.norm1")
    wanted = {
        "unet.down_blocks.0.resnets.0.norm1.weight": norm.weight + 0.5 * state["lora_unet_down_blocks_0_resnets_0_norm1.w_norm"],
        "unet.down_blocks.0.resnets.0.norm1.bias": norm.bias + 0.5 * state["lora_unet_down_blocks_0_resnets_0_norm1.b_norm"],
        "unet.conv_in.weight": net.conv_in.weight + 0.5 * state["lora_unet_conv_in.diff"],
        "unet.conv_in.bias": net.conv_in.bias + 0.5 * state["lora_unet_conv_in.diff_b"],
    }  # fmt: skip
    assert_same(found, wanted)


STRENGTHS = st.floats(-3, 3, allow_nan=False)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    strengths=st.lists(STRENGTHS, min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_whatever_was_worn_the_own_weights_come_back_bit_for_bit(ours, strengths, dtype):
    from copy import deepcopy

    nets = {role: deepcopy(net).to(dtype) for role, net in ours().parts.adaptable.items()}
    before = weights_of(nets)
    adapters = [read_adapter(files.given(kohya(random_lora(nets, seed=seed))), nets) for seed in range(3)]
    for count, strength in enumerate(strengths):
        for role, net in nets.items():
            wear(net, role, [Worn(adapter, strength) for adapter in adapters[: count + 1]])
    for role, net in nets.items():
        wear(net, role, [Worn(adapter, 0.0) for adapter in adapters])
    assert all(torch.equal(one, before[name]) for name, one in weights_of(nets).items())
    # What was worn before makes no difference, and what is not touched is not there twice.
    for role, net in nets.items():
        wear(net, role, [Worn(adapters[1], 0.7)])
    again = weights_of(nets)
    touched = {f"{role}.{name}" for role, net in nets.items() for name in net.overlay.own}
    assert touched == {f"{role}.{path}.weight" for role, paths in adapters[1].changes.items() for path in paths}
    assert all(torch.equal(one, before[name]) for name, one in again.items() if name not in touched)
    fresh = {role: deepcopy(net).to(dtype) for role, net in ours().parts.adaptable.items()}
    for role, net in fresh.items():
        wear(net, role, [Worn(adapters[1], 0.7)])
    assert all(torch.equal(one, again[name]) for name, one in weights_of(fresh).items())


def test_packed_weights_see_what_is_worn(ours):
    from copy import deepcopy

    net = deepcopy(ours().unet)
    plain = deepcopy(net)
    adapter = read_adapter(files.given(kohya(random_lora({"unet": net}, convolutions=True))), {"unet": net})
    try:
        kernels = kernels_for(torch.float32)
    except CompilerError as error:
        pytest.skip(str(error))
    pack(net, kernels)
    before = net.state_dict()
    for worn in ([Worn(adapter, 0.8)], [Worn(adapter, -1.0)], []):
        wear(net, "unet", worn)
        wear(plain, "unet", worn)
        pack(net, kernels)
        assert is_packed(net)
        found = net.state_dict()
        assert all(torch.equal(one, found[name]) for name, one in plain.state_dict().items())
    assert all(torch.equal(one, before[name]) for name, one in net.state_dict().items())


def test_a_cast_or_a_move_gives_the_own_weights_back_first(ours):
    from copy import deepcopy

    net = deepcopy(ours().unet)
    wanted = deepcopy(net).half().state_dict()
    adapter = read_adapter(files.given(kohya(random_lora({"unet": net}))), {"unet": net})
    wear(net, "unet", [Worn(adapter)])
    found = net.half().state_dict()
    assert all(torch.equal(one, found[name]) for name, one in wanted.items())


def test_weights_by_part_and_block(nets):
    weight, parts = weights_from(
        {"text_encoder": 0.5, "unet": {"down": 0.9, "up": {"block_1": [0.4, 0.8], "block_2": 0.1}}}
    )
    worn = Worn(read_adapter(files.given(kohya(random_lora(nets))), nets), weight, parts)
    assert (worn.strength("text_encoder", "text_model.x"), worn.strength("text_encoder_2", "text_model.x")) == (
        0.5,
        1.0,
    )
    assert worn.strength("unet", "down_blocks.2.attentions.0.proj_in") == 0.9
    assert worn.strength("unet", "up_blocks.1.attentions.1.proj_in") == 0.8
    assert worn.strength("unet", "up_blocks.2.attentions.1.proj_in") == 0.1
    assert worn.strength("unet", "mid_block.attentions.0.proj_in") == 1.0
    for wrong in (float("nan"), "strong", True, {"vae": 1}, {"unet": {"side": 1}}, {"unet": {"up": {"x": 1}}}):
        with pytest.raises(UsageError):
            weights_from(wrong)


def spoiled(nets, how):
    state = kohya(random_lora(nets))
    key = next(key for key in state if "attn1_to_q.lora_down" in key)
    if how == "NaN":
        state[key][0, 0] = float("nan")
    elif how == "rank 0":
        state[key] = state[key][:0]
    elif how == "shape":
        state[key] = state[key][:, :-1].contiguous()
    elif how == "half":
        del state[key]
    elif how == "unknown":
        state["lora_unet_down_blocks_0_attentions_0_proj_in.surprise"] = torch.zeros(3)
    elif how == "alpha":
        state[key.replace("lora_down.weight", "alpha")] = torch.tensor(float("inf"))
    return state


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("NaN", "NaN"),
        ("rank 0", "rank 0"),
        ("shape", "does not fit"),
        ("half", "keys are unknown"),
        ("unknown", "surprise|keys are unknown"),
        ("alpha", "alpha of .* is inf"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(nets, how, said):
    with pytest.raises(CheckpointError, match=said):
        read_adapter(files.given(spoiled(nets, how)), nets)


def test_unknown_keys_are_passed_over_with_the_users_word_only(nets):
    state = spoiled(nets, "unknown")
    adapter = read_adapter(files.given(state), nets, partial=True)
    assert len(adapter.unknown) == 1
    assert "unknown keys ignored: 1" in adapter.report
    assert f"applied {adapter.total} of {adapter.total}" in adapter.report


def test_a_file_of_another_family_is_named(nets):
    state = {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": torch.zeros(4, 2048),
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_up.weight": torch.zeros(640, 4),
    }
    with pytest.raises(CheckpointError, match="made for Stable Diffusion XL, but this checkpoint"):
        read_adapter(files.given(state), nets)
    with pytest.raises(CheckpointError, match=r"cannot be applied.*diffusion transformer"):
        read_adapter(files.given({"lora_unet_double_blocks_0_img_mlp_0.lora_down.weight": torch.zeros(4, 8), "lora_unet_double_blocks_0_img_mlp_0.lora_up.weight": torch.zeros(8, 4)}), nets)  # fmt: skip
    with pytest.raises(CheckpointError, match="no known adapter is in it"):
        read_adapter(files.given({"model.diffusion_model.x.weight": torch.zeros(4, 8)}), nets)


def test_damaged_and_pickled_files(tmp_path, nets):
    path = tmp_path / "a.safetensors"
    save_file(kohya(random_lora(nets)), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        files.read_stored(path)
    pickled = tmp_path / "a.pt"
    torch.save(kohya(random_lora(nets)), pickled)
    with pytest.raises(CheckpointError, match="can run code"):
        files.read_stored(pickled)
    assert read_adapter(files.read_stored(pickled, pickled=True), nets).total

    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"x": Evil()}, pickled)
    with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
        files.read_stored(pickled, pickled=True)


def test_show_says_what_a_file_is(tmp_path, nets):
    path = tmp_path / "style.safetensors"
    told = {
        "ss_output_name": "MyStyle",
        "ss_sd_model_name": "v1-5",
        "ss_tag_frequency": json.dumps({"10_x": {"fog": 7, "cat": 9}}),
    }
    save_file(kohya(random_lora(nets)) | {"bundle_emb.glow.string_to_param.*": torch.zeros(2, 24)}, path, told)
    about = about_adapter(path)
    assert is_adapter(path)
    assert about["kinds"].keys() == {"LoRA"}
    assert about["ranks"] == [1, 2, 3, 4]
    assert about["trigger_words"] == ["cat", "fog"]
    assert about["embeddings"] == ["glow"]
    assert about["training"] == {"trained on": "v1-5"}
    assert set(about["modules"]) == {"U-Net", "text encoder"}
    assert find_adapter("mystyle", tmp_path) == find_adapter("Style", tmp_path) == path
    with pytest.raises(UsageError, match="no adapter 'other'"):
        find_adapter("other", tmp_path)
    plain = tmp_path / "weights.safetensors"
    save_file({"conv_in.weight": torch.zeros(3)}, plain)
    assert not is_adapter(plain)


def test_files_are_found_by_the_hashes_that_others_write(tmp_path, nets):
    """A1111 and Civitai say how one begins, of the weights (AutoV3) or of the file (AutoV2); names change."""
    tensors = kohya(random_lora(nets))
    paths = {}
    for number, (name, told) in enumerate({"old": {}, "renamed": {}, "told": {"sshs_model_hash": "ab" * 32}}.items()):
        state = {key: one + number for key, one in tensors.items()}
        save_file(state, paths.setdefault(name, tmp_path / f"{name}.safetensors"), told)
    data = paths["renamed"].read_bytes()
    weights = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    for known in (weights[:12], hashlib.sha256(data).hexdigest()[:10], weights):
        assert find_adapter("Old", tmp_path, {"old": known}) == paths["renamed"]
        assert hashes_to(paths["renamed"], known)
    assert find_adapter("old", tmp_path, {"old": "ab" * 6}) == paths["told"]
    # Where there is none, the name decides; and it does where nothing is known of it.
    assert find_adapter("old", tmp_path, {"old": "0" * 12}) == paths["old"]
    assert find_adapter("old", tmp_path, {"other": weights[:12]}) == paths["old"]
    assert find_adapter("away", tmp_path, {"away": weights[:12]}) == paths["renamed"]
    with pytest.raises(UsageError, match="no adapter 'away'"):
        find_adapter("away", tmp_path, {"away": "0" * 12})


@pytest.fixture
def folder(ours, tmp_path):
    save_file(kohya(random_lora(ours().parts.adaptable)), tmp_path / "fog.safetensors", {"ss_output_name": "Mist"})
    return tmp_path


def test_adapters_are_deleted_and_switched_off(ours, folder):
    pipe, request = ours(), GenerateRequest(prompt="a fox", steps=1, seed=1)
    drawn = lambda: pipe.generate(request).images[0].tobytes()  # noqa: E731
    plain = drawn()
    for name in ("one", "other"):
        pipe.load_lora_weights(folder / "fog.safetensors", adapter_name=name)
    pipe.set_adapters(["one", "other"], [0.5, 0.25])
    both = drawn()
    pipe.delete_adapters("other")
    assert pipe.get_list_adapters().keys() == {"unet", "text_encoder"}
    assert (pipe.get_list_adapters()["unet"], pipe.get_active_adapters()) == (["one"], ["one"])
    one = drawn()
    pipe.disable_lora()
    assert drawn() == plain
    pipe.enable_lora()
    assert drawn() == one
    assert len({plain, both, one}) == 3
    with pytest.raises(UsageError, match="other"):
        pipe.set_adapters("other")
    pipe.delete_adapters(["one"])
    assert drawn() == plain
    assert pipe.get_active_adapters() == []


@pytest.mark.parametrize("how", ["unload_lora_weights", "disable_lora", "delete_adapters"])
def test_networks_have_their_own_weights_as_soon_as_nothing_is_worn(ours, folder, how):
    pipe = ours()
    key = next(name for name in pipe.unet.state_dict() if name.endswith("attn1.to_q.weight"))
    own = pipe.unet.state_dict()[key].clone()
    for name in ("one", "other"):
        pipe.load_lora_weights(folder / "fog.safetensors", adapter_name=name)
    pipe.set_adapters("one")
    pipe.generate(GenerateRequest(prompt="a fox", steps=1, seed=1))
    merged = pipe.unet.state_dict()[key].clone()
    assert not torch.equal(merged, own)
    if how == "delete_adapters":
        pipe.delete_adapters("other")  # which is not worn
        assert torch.equal(pipe.unet.state_dict()[key], merged)
    getattr(pipe, how)(*(["one"] if how == "delete_adapters" else []))
    assert torch.equal(pipe.unet.state_dict()[key], own)


def test_staged_and_compiled_networks_see_what_is_worn(ours, checkpoints, folder):
    adapter = AdapterFile(file=str(folder / "fog.safetensors"), weight=0.7)
    request = GenerateRequest(prompt="a fox", steps=2, seed=1, adapters=(adapter,))
    plain, staged = (
        sfumato.load(checkpoints(), device="cpu", dtype=torch.float32, **more) for more in ({}, {"offload": "staged"})
    )
    wanted = plain.generate(request).images[0].tobytes()
    own = plain.generate(request.replace(adapters=())).images[0].tobytes()
    for one in (request, request.replace(adapters=()), request):
        assert staged.generate(one).images[0].tobytes() == (wanted if one.adapters else own)
    compiled = ours()
    compiled.unet.compile(backend="eager")
    pictures = [compiled.generate(one).images[0] for one in (request, request.replace(adapters=()), request)]
    others = [ours().generate(one).images[0] for one in (request, request.replace(adapters=()), request)]
    assert [one.tobytes() for one in pictures] == [one.tobytes() for one in others]


def test_core_ml_models_are_made_of_the_merged_weights(ours, checkpoints, folder):
    from sfumato.coreml.source import open_source

    adapter = AdapterFile(file=str(folder / "fog.safetensors"), weight=0.7)
    source, plain = open_source(checkpoints("sd15"), adapters=(adapter,)), open_source(checkpoints("sd15"))
    for part in ("unet", "text_encoder"):
        net = plain.load(part)
        read = read_adapter(files.read_stored(folder / "fog.safetensors"), {part: net}, partial=True)
        wear(net, part, [Worn(read, 0.7)])
        baked = source.load(part).state_dict()
        assert all(torch.equal(one, baked[name]) for name, one in net.state_dict().items())
        assert any(not torch.equal(one, baked[name]) for name, one in plain.load(part).state_dict().items())
    assert source.hash != plain.hash


def test_prompts_of_a_request_name_adapters(ours, folder):
    request = GenerateRequest(
        prompt="a fox<lora:MIST:0.5:-1>", prompt_syntax="a1111", lora_dir=str(folder), steps=1, seed=1
    )
    result = ours().generate(request)
    assert result.request.prompt == "a fox"
    (told,) = result.recipes[0]["request"]["adapters"]
    assert (told["file"], told["weight"], told["text_weight"]) == (str(folder / "fog.safetensors"), -1, 0.5)
    assert "lora_dir" not in result.recipes[0]["request"]
    asked = request.replace(prompt="a fox", lora_dir=None, adapters=(AdapterFile.from_dict(told),))
    assert ours().generate(asked).images[0].tobytes() == result.images[0].tobytes()
    several = request.replace(prompt=("a fox <lora:fog:1>", "a cat <lora:fog:1>"))
    assert with_named_adapters(several).prompt == ("a fox ", "a cat ")
    with pytest.raises(UsageError, match="name different adapters"):
        ours().generate(several.replace(prompt=("a fox <lora:fog:1>", "a cat")))


def test_parameters_name_adapters_as_a1111_does(ours, folder):
    request = GenerateRequest(
        prompt="a fox", prompt_syntax="a1111", steps=1, seed=1,
        adapters=(AdapterFile(file=str(folder / "fog.safetensors"), weight=0.5),),
    )  # fmt: skip
    recipe = ours().generate(request).recipes[0]
    data = (folder / "fog.safetensors").read_bytes()
    after = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()[:12]
    assert recipe["adapters"] == {"fog": after}
    told = parse(parameters(recipe, (16, 16)))
    assert told.prompt == "a fox <lora:fog:0.5>"
    assert told.fields["Lora hashes"] == f"fog: {after}"
    assert f', Lora hashes: "fog: {after}", ' in parameters(recipe, (16, 16))
    # What the file says of itself is what its trainer published.
    save_file({"lora_unet_conv_in.diff_b": torch.ones(16)}, folder / "own.safetensors", {"sshs_model_hash": "ab" * 32})
    assert files.read_stored(folder / "own.safetensors").weights_hash == "ab" * 32


def test_files_that_moved_are_found_by_their_hash(folder):
    sha256 = files.read_stored(folder / "fog.safetensors").sha256
    there = AdapterFile(file=str(folder / "fog.safetensors"), sha256=sha256)
    (folder / "inside").mkdir()
    (folder / "fog.safetensors").rename(folder / "inside" / "renamed.safetensors")
    save_file({"lora_unet_conv_in.diff_b": torch.ones(16)}, folder / "other.safetensors")
    (found,) = moved((there,), folder)
    assert found == there.replace(file=str(folder / "inside" / "renamed.safetensors"))
    assert moved((found,), folder) == (found,)
    assert moved((there.replace(sha256="0" * 64),), folder) == (there.replace(sha256="0" * 64),)


def test_a_plan_counts_the_weights_that_are_kept(ours, nets):
    pipe = ours()
    adapter = read_adapter(files.given(kohya(random_lora(nets))), nets)
    names = {role: {f"{path}.weight" for path in changes} for role, changes in adapter.changes.items()}
    assert kept_bytes(nets["unet"], "unet", [Worn(adapter)]) == sum(
        one.nbytes for name, one in nets["unet"].named_parameters() if name in names["unet"]
    )
    assert kept_bytes(nets["unet"], "unet", [Worn(adapter, parts={"unet": 0.0})]) == 0
    assert kept_bytes(nets["unet"], "unet", []) == 0
    request = GenerateRequest(prompt="fog", steps=1)
    more = (
        pipe.place.plan(pipe.parts, request, [Worn(adapter)]).peak_bytes
        - pipe.place.plan(pipe.parts, request).peak_bytes
    )
    assert more >= kept_bytes(nets["unet"], "unet", [Worn(adapter)]) > 0


def test_requests_carry_their_files_through_json():
    request = GenerateRequest(
        prompt="fog",
        adapters=(AdapterFile(file="a.safetensors", weight=-0.5, parts={"unet.mid_block": 0.0}), AdapterFile(file="b")),
        embeddings=(EmbeddingFile(file="c", token="fog"),),
    )
    assert GenerateRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request
    for wrong in ({"weight": "x"}, {"weight": float("nan")}, {"file": ""}, {"sha256": "1"}, {"parts": {"unet": "x"}}):
        with pytest.raises(UsageError):
            AdapterFile(**{"file": "a"} | wrong)
