"""What is known of where parameters come from: it belongs to the tensor object, and dies with it."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hookcore.memory import Checkpoint, origin_of
from hookcore.memory.files.mapped_file import map_checkpoint
from hookcore.memory.files.origin import Origin, set_origin
from hookcore.testing.snapshot import same_bits


@pytest.fixture
def origin(tmp_path):
    save_file({"weight": torch.arange(6.0).view(2, 3)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    entry = checkpoint.entries["weight"]
    return Origin.of_entry(checkpoint, entry, map_checkpoint(checkpoint)[entry.path])


def test_an_origin_shows_the_mapped_tensor_and_wants_its_dtype_unless_told(origin):
    assert same_bits(origin.raw, torch.arange(6.0).view(2, 3))
    assert origin.dtype == torch.float32
    told = Origin.of_entry(origin.checkpoint, origin.entry, origin.mapping, torch.float16)
    assert told.dtype == torch.float16
    assert told.raw.dtype == torch.float32
    assert told.raw.data_ptr() == origin.raw.data_ptr()


def test_it_is_known_of_one_object_whatever_that_holds(origin):
    tensor, equal = nn.Parameter(origin.raw), nn.Parameter(origin.raw)
    set_origin(tensor, origin)
    assert origin_of(tensor) is origin
    assert origin_of(equal) is None
    assert origin_of(copy.deepcopy(tensor)) is None
    tensor.data = torch.zeros(2, 3)
    assert origin_of(tensor) is origin


def test_it_is_forgotten_when_asked_any_number_of_times(origin):
    tensor = nn.Parameter(origin.raw)
    set_origin(tensor, None)
    set_origin(tensor, origin)
    set_origin(tensor, None)
    set_origin(tensor, None)
    assert origin_of(tensor) is None


def test_it_keeps_no_tensor_alive():
    tensor = nn.Parameter(torch.zeros(2, 3))
    set_origin(tensor, Origin(None, None, None, tensor.data, torch.float32))
    told = weakref.ref(tensor)
    del tensor
    gc.collect()
    assert told() is None
