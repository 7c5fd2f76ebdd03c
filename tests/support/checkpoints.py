"""Checkpoints for tests: models and files, and what users and others do to them."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import os
import pickle
import random
import threading
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from hookcore.memory import FileMover
from hookcore.memory.files import file_mover as disk

# Making checkpoints and models


def stored_tensors(model):
    """The state dict with each tensor in memory of its own, tied ones once, as save_pretrained writes it."""
    seen = set()
    stored = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            stored[key] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return stored


def save(tensors, folder, shards=1):
    """Writes a checkpoint of some shards, the tensors dealt round."""
    folder = Path(folder)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
    dealt = {name: {} for name in names}
    for name, (key, tensor) in zip(itertools.cycle(names), tensors.items(), strict=False):
        dealt[name][key] = tensor
    for name, part in dealt.items():
        if part:
            save_file(part, folder / name)
    weight_map = {key: name for name, part in dealt.items() for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def class_of(case):
    """A class whose call without arguments makes the case's model."""
    kind = type(case.build())
    return type("Drawn", (kind,), {"__init__": lambda self: vars(self).update(vars(case.build()))})


class Wide(nn.Module):
    """Layers that each take many pages, so that an edit of one leaves the others' pages as they are."""

    def __init__(self, layers=4):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


X = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))


def wide(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Wide().to(dtype).eval()


def contents(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path(folder).iterdir()}


# Copies

copyings = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(through_file(model), weights_only=False),
}


def through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


# Edits


def edit(model, how, layer, value):  # noqa: C901 - a list of ways
    """One change, as users make it."""
    linear = model.layers[layer]
    weight = linear.weight
    new = torch.full((128, 128), value)
    with torch.no_grad():
        match how:
            case "copy_":
                weight.copy_(new)
            case "add_":
                weight[:60].add_(value)
            case "data.add_":
                weight.data[3].add_(value)
            case "data =":
                weight.data = new
            case "bias" if linear.bias is not None:  # an earlier step may have put one without there
                linear.bias.data.mul_(value)
            case "load_state_dict":
                model.load_state_dict({f"layers.{layer}.weight": new}, strict=False)
            case "assign":
                model.load_state_dict({f"layers.{layer}.weight": new}, strict=False, assign=True)
            case "parameter":
                linear.weight = nn.Parameter(new)
            case "assign all":
                model.load_state_dict(
                    {key: it * value for key, it in model.state_dict().items()}, assign=True
                )
            case "module":
                model.layers[layer] = nn.Linear(128, 128, bias=False).requires_grad_(False)
                model.layers[layer].weight.fill_(value / 128)


edits = st.tuples(
    st.sampled_from(
        [
            "copy_",
            "add_",
            "data.add_",
            "data =",
            "bias",
            "load_state_dict",
            "assign",
            "parameter",
            "assign all",
            "module",
        ]
    ),
    st.integers(0, 3),
    st.sampled_from([-0.5, 0.25, 1.5]),
)


# Files that change


def damage(path, how):
    """Changes a file; returns what puts it back as it was."""
    aside = path.with_suffix(".aside")
    before = path.stat()
    data = path.read_bytes()

    def rewrite(new):
        with path.open("r+b") as file:
            file.truncate(len(new))
            file.write(new)

    def put_back():
        rewrite(data)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    match how:
        case "truncate":
            with path.open("r+b") as file:
                file.truncate(len(data) // 2)
        case "append":
            rewrite(data + b"more")
        case "overwrite":
            rewrite(data[:-70_000] + bytes(70_000))
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        case "replace":
            path.rename(aside)
            path.write_bytes(data[:-70_000] + bytes(70_000))
            return lambda: aside.replace(path)
        case "delete":
            path.rename(aside)
            return lambda: aside.replace(path)
    return put_back


every_damage = pytest.mark.parametrize("how", ["truncate", "append", "overwrite", "replace", "delete"])


# Forcing a way of reading


@contextlib.contextmanager
def reading(way, seed=0):
    """Has groups be mapped, or read directly, or the one or the other as a seed says."""
    counts = {}
    lock = threading.Lock()

    def is_cached(ranges):
        if way != "mixed":
            return way == "mapped"
        where = [(str(it.mapping.path.name), it.start) for it in ranges]
        with lock:
            number = counts[str(where)] = counts.get(str(where), 0) + 1
        return random.Random(f"{seed} {where} {number}").random() < 0.5  # noqa: S311

    with patch.object(disk, "is_cached", is_cached):
        yield


ways = st.sampled_from(["mapped", "read", "mixed"])
each_way = pytest.mark.parametrize("way", ["mapped", "read"])


@contextlib.contextmanager
def watching_memory():
    """Fails as soon as a mover takes more memory than it may."""

    def check(mover):
        room = mover._pool
        taken = room.arena.lent()  # first, as it takes back what nobody looks at any more
        pieces = [*(piece for _, piece in room._leaving), *room.arena._looked_at, *room._left_behind]
        for it in room._movers.values():
            for loads in (it._in_use, it._resident, it._ahead, it._kept):
                pieces += [piece for load in loads.values() for piece in load.page_ranges]
            assert sum(load.nbytes for load in it._ahead.values()) <= room.read_ahead
        assert taken == sum(piece.nbytes for piece in pieces if piece._memory is room.arena._memory)

    def checked(name):
        original = getattr(FileMover, name)

        def method(mover, *args, **kwargs):
            original(mover, *args, **kwargs)
            check(mover)
            if name == "end":
                assert not mover._in_use
                assert not mover._pool.is_leaving

        return patch.object(FileMover, name, method)

    with contextlib.ExitStack() as stack:
        for name in ("begin", "end", "onload", "offload"):
            stack.enter_context(checked(name))
        yield
