"""Real files on networks of full width and with the real vocabulary: every module and every word accounted for."""

from __future__ import annotations

import pytest
import torch

from sfumato.adapters.adapter import read_adapter
from sfumato.adapters.embeddings import check_fits, read_embeddings
from sfumato.adapters.files import read_stored
from sfumato.adapters.kinds import weight_change
from sfumato.checkpoints.weights import without_weights
from sfumato.errors import CheckpointError
from sfumato.models import CLIPTextModel, UNet2DConditionModel
from sfumato.text.embeddings import NewWords
from sfumato.text.tokenizer import CLIPTokenizer
from support.assets import asset
from support.checkpoints import FULL_SIZE_UNET

CLIP_L = {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}  # fmt: skip


@pytest.fixture(scope="module")
def nets():
    """Stable Diffusion 1.5 without weights: shapes are all that fitting asks for."""
    with without_weights():
        return {"unet": UNet2DConditionModel(**FULL_SIZE_UNET), "text_encoder": CLIPTextModel(**CLIP_L)}


def test_a_real_file_of_the_first_library(nets):
    stored = read_stored(asset("lora") / "analog_svd_rank4.safetensors")
    adapter = read_adapter(stored, nets)
    assert adapter.report == "applied 192 of 192 (U-Net 144, text encoder 48)"
    assert adapter.unknown == ()
    used = 0
    for role, number in (("unet", 144), ("text_encoder", 48)):
        for order, change in zip(range(number), adapter.changes[role].values(), strict=True):
            assert set(change.parts) == {"up", "down"}
            used += 2
            assert order < number
    assert used == len(stored.tensors) == 384
    # Layer 6 of the file is the first that reads the prompt: its down matrix is 768 wide.
    first = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    change = adapter.changes["unet"][first]
    assert torch.equal(change.parts["down"], stored.tensors["unet:6:down"])
    weight = torch.randn(320, 768, generator=torch.Generator().manual_seed(0))
    wanted = stored.tensors["unet:6:up"].double() @ stored.tensors["unet:6:down"].double()
    torch.testing.assert_close(weight_change(change, weight, 1.0).double(), wanted, atol=1e-6, rtol=1e-5)
    last = adapter.changes["unet"]["mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"]
    assert torch.equal(last.parts["up"], stored.tensors["unet:143:up"])


def test_real_embeddings_with_the_real_vocabulary(nets):
    tokenizer = CLIPTokenizer.from_folder(asset("clip_bpe"))
    every = []
    for name in ("cat-toy", "gta5-artwork"):
        path = asset("textual_inversion") / f"{name}.bin"
        with pytest.raises(CheckpointError, match="can run code"):
            read_stored(path)
        (embedding,) = read_embeddings(read_stored(path, pickled=True))
        check_fits([embedding], [768], name)
        assert embedding.names == (f"<{name}>", name)
        every.append(embedding)
    new = NewWords.of(every, 768, 49408)
    assert new.vectors is not None
    assert new.vectors.shape == (2, 768)
    ids = tokenizer.fitted(["a <cat-toy>, gta5-artwork of a cat-toys"], words=new.ids).input_ids[0].tolist()
    assert [one for one in ids if one >= 49408] == [49408, 49409]
    with pytest.raises(CheckpointError, match="768 values per vector, but the text encoder here needs 1024"):
        check_fits(every, [1024], "x")
