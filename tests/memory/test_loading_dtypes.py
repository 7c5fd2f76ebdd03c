"""Weights that a model's library keeps in float32 are loaded so, as its own from_pretrained does."""

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import T5Config, T5EncoderModel

import hookcore

SMALL_T5 = T5Config(
    vocab_size=20, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
)


class KeepingAutoencoder(AutoencoderKL):
    _keep_in_fp32_modules = ["conv_in", "mid_block"]  # noqa: RUF012 - as diffusers' own classes have it


def same_dtypes(model, expected):
    assert {name: it.dtype for name, it in model.state_dict().items()} == {
        name: it.dtype for name, it in expected.state_dict().items()
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, None])
def test_a_transformers_model(tmp_path, dtype):
    T5EncoderModel(SMALL_T5).to(torch.bfloat16).save_pretrained(tmp_path)
    expected = T5EncoderModel.from_pretrained(tmp_path, dtype=dtype or "auto")
    model = hookcore.load(T5EncoderModel, tmp_path, torch_dtype=dtype)
    same_dtypes(model, expected)
    if dtype is torch.float16:
        assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_diffusers_model(tmp_path, dtype):
    KeepingAutoencoder(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path)
    expected = KeepingAutoencoder.from_pretrained(tmp_path, torch_dtype=dtype)
    model = hookcore.load(KeepingAutoencoder, tmp_path, torch_dtype=dtype)
    same_dtypes(model, expected)
    assert {model.encoder.conv_in.weight.dtype, model.decoder.conv_out.weight.dtype} == {torch.float32, dtype}
