"""Checkpoints whose names a model's library turns into others as it loads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import hookcore
from hookcore import CheckpointError
from hookcore.testing import same_bits
from hookcore_plugins import DiskOffload

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def mixtral(transformers):
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2, vocab_size=32)
    return transformers.MixtralForCausalLM(config).eval()


def test_a_checkpoint_that_is_merged_as_it_is_loaded_is_refused_with_what_converts_it(transformers, tmp_path):
    model = mixtral(transformers)
    model.save_pretrained(tmp_path / "as written")
    with pytest.raises(CheckpointError, match=r"save_pretrained\(new, save_original_format=False\)"):
        hookcore.load(type(model), tmp_path / "as written", ["disk_offload"])
    with pytest.raises(CheckpointError, match=r"makes '.*' of '.*\.experts\..*' and others"):
        hookcore.apply(model, [DiskOffload(tmp_path / "as written")])
    model.save_pretrained(tmp_path / "new", save_original_format=False)  # as the message says
    streamed = hookcore.load(type(model), tmp_path / "new", ["disk_offload"])
    tokens = torch.arange(5)[None]
    with torch.no_grad():
        torch.testing.assert_close(streamed(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("written", ["GPT2LMHeadModel", "GPT2Model"])
@pytest.mark.parametrize("loaded", ["GPT2LMHeadModel", "GPT2Model"])
def test_a_base_model_and_one_with_a_head_read_the_same_checkpoint(transformers, written, loaded, tmp_path):
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, vocab_size=32)
    getattr(transformers, written)(config).save_pretrained(tmp_path)
    streamed = hookcore.load(getattr(transformers, loaded), tmp_path, ["disk_offload"])
    expected = getattr(transformers, loaded).from_pretrained(tmp_path)
    for (name, ours), theirs in zip(streamed.named_parameters(), expected.parameters(), strict=True):
        assert same_bits(ours.detach(), theirs.detach()), name


@settings(max_examples=20)
@given(old=st.sets(st.sampled_from(["gamma", "beta"])))
def test_names_of_old_writers_are_read(tmp_path_factory, old):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("old")
    model = transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=32)).eval()
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    names = {"gamma": "LayerNorm.weight", "beta": "LayerNorm.bias"}
    tensors = load_file(path)
    for name in old:
        tensors = {key.replace(names[name], f"LayerNorm.{name}"): it for key, it in tensors.items()}
    save_file(tensors, path, {"format": "pt"})
    streamed = hookcore.load(transformers.BertModel, folder, ["disk_offload"])
    assert all(same_bits(*pair) for pair in zip(streamed.parameters(), model.parameters(), strict=True))


def test_attention_of_old_diffusers_models_is_read(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    options = {"block_out_channels": (4,), "norm_num_groups": 2, "latent_channels": 2, "sample_size": 8}
    model = diffusers.AutoencoderKL(**options).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for key, tensor in load_file(path).items():
        new = key
        for name, before in old.items():
            new = new.replace(f".{name}.", f".{before}.")
        tensors[new] = tensor
    assert tensors.keys() != load_file(path).keys()
    save_file(tensors, path, {"format": "pt"})
    streamed = hookcore.load(diffusers.AutoencoderKL, tmp_path, ["disk_offload"])
    assert all(same_bits(*pair) for pair in zip(streamed.parameters(), model.parameters(), strict=True))
