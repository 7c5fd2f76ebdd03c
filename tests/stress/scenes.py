"""What is stressed: each technique on some small models, and what has to be true of them at any time."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from autoencoders import PointwiseAutoencoder
from safetensors.torch import save_file
from torch import nn

import hookcore
import hookcore.testing.simulator as sim
from hookcore.testing import ModelSnapshot, same_bits
from hookcore.testing.cases import tensors_in
from hookcore.testing.modules import WeightReader
from hookcore_plugins import (
    AttentionBackend,
    ChannelsLast,
    DiskOffload,
    GroupOffload,
    LayerwiseCasting,
    ModelOffload,
    SequentialOffload,
    Slicing,
    Tiling,
    Trace,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from hookcore import Technique

WIDTH = 16
_SECONDS = 20  # after which another thread counts as waiting for ever

sim.install()


# Models: each takes (3, WIDTH), but for the last


def layers() -> nn.Module:
    """Layers in a row, one of them with buffers."""
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)
    )


def tied() -> nn.Module:
    """Two layers with one weight, and one whose weight its parent reads."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), WeightReader(WIDTH))
    model[1].weight = model[0].weight
    return model


def blocks() -> nn.Module:
    """Equal blocks of two layers."""
    made = [
        nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(3)
    ]
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(*made))


class Attending(nn.Module):
    """Attention of the rows to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.projection(x)[None, None].chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(q, k, v)[0, 0]


def pictures() -> nn.Module:
    """An autoencoder."""
    return PointwiseAutoencoder(4)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layers": layers,
    "tied": tied,
    "blocks": blocks,
    "attending": Attending,
    "pictures": pictures,
}


# Techniques, of the folder of the model's checkpoint and its inputs

TECHNIQUES: dict[str, Callable[[Path, torch.Tensor], list[Technique]]] = {
    "leaves": lambda folder, x: [GroupOffload("sim", offload_type="leaf_level")],
    "blocks": lambda folder, x: [GroupOffload("sim", offload_type="block_level", num_blocks_per_group=1)],
    "budget": lambda folder, x: [GroupOffload("sim", memory_budget=8000)],
    "no_stream": lambda folder, x: [GroupOffload("sim", offload_type="leaf_level", use_stream=False)],
    "groups_on_disk": lambda folder, x: [
        GroupOffload("sim", offload_type="leaf_level", offload_to_disk_path=folder)
    ],
    "sequential": lambda folder, x: [SequentialOffload("sim")],
    "model": lambda folder, x: [ModelOffload("sim")],
    "disk": lambda folder, x: [DiskOffload(folder)],
    "disk_to_device": lambda folder, x: [DiskOffload(folder, execution_device="sim")],
    "casting": lambda folder, x: [LayerwiseCasting(torch.bfloat16)],
    "casting_originals": lambda folder, x: [LayerwiseCasting(torch.float8_e4m3fn, keep_originals=True)],
    "casting_and_leaves": lambda folder, x: [
        LayerwiseCasting(torch.bfloat16),
        GroupOffload("sim", offload_type="leaf_level"),
    ],
    "attention": lambda folder, x: [AttentionBackend("chunked")],
    "channels_last": lambda folder, x: [ChannelsLast()],
    "slicing": lambda folder, x: [Slicing()],
    "tiling": lambda folder, x: [Tiling(8)],
    "trace": lambda folder, x: [Trace((x,))],
}

SETUPS: list[tuple[str, str]] = [
    *(
        (technique, model)
        for technique in ("leaves", "blocks", "budget", "no_stream", "groups_on_disk", "sequential", "model")
        for model in ("layers", "tied", "blocks")
    ),
    *(
        (technique, model)
        for technique in ("disk", "disk_to_device")
        for model in ("layers", "tied", "blocks")
    ),
    *(
        (technique, model)
        for technique in ("casting", "casting_originals", "casting_and_leaves")
        for model in ("layers", "blocks")
    ),
    ("attention", "attending"),
    ("channels_last", "pictures"),
    ("slicing", "pictures"),
    ("tiling", "pictures"),
    ("trace", "blocks"),
    ("leaves", "pictures"),
    ("casting", "attending"),
]
"""Techniques with the models that they are tried on, by name."""

VERBS = ("apply", "first call", "later call", "reset", "remove")
"""What is done with a model, in this order."""


def make_model(name: str) -> nn.Module:
    """Builds a model, each time the same, with weights that bfloat16 holds exactly."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) / 8).copy_(tensor.bfloat16())
    return model


def make_input(name: str, seed: int = 0) -> torch.Tensor:
    """Makes what a model is called with, on the CPU."""
    shape = (2, 3, 14, 12) if name == "pictures" else (3, WIDTH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def output_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Calls a model without gradients; returns the output on the CPU."""
    with torch.no_grad():
        (output,) = tensors_in(model(x))
    return output.cpu()


class Scene(contextlib.AbstractContextManager["Scene"]):
    """A model with its checkpoint on disk, techniques that may be put on it, and what is right for it.

    Attributes:
        model: The model.
        x: What it is called with.
        folder: Where its checkpoint is.
        techniques: What is put on it.
        applied: The handle of `apply`; None before that.
    """

    def __init__(self, technique: str, model: str) -> None:
        self._names = technique, model
        self.applied: hookcore.Applied | None = None

    def __enter__(self) -> Self:
        """Builds it anew: nothing of an earlier scene is left."""
        self._temporary = tempfile.TemporaryDirectory(prefix="stress-", ignore_cleanup_errors=True)
        technique, model = self._names
        self.folder = Path(self._temporary.name)
        self.model = make_model(model)
        self.x = make_input(model)
        save_file(_stored(self.model), self.folder / "model.safetensors")
        self.techniques = TECHNIQUES[technique](self.folder, self.x)
        self.before = ModelSnapshot.take(self.model)
        return self

    def __exit__(self, *_: object) -> None:
        self._temporary.cleanup()
        sim.reset()

    def leave_files(self) -> None:
        """Has the end of a child, of whose files this is a copy, leave them to its parent."""
        self._temporary._finalizer.detach()

    def do(self, verb: str) -> None:
        """Does one of `VERBS`."""
        getattr(self, verb.rpartition(" ")[2])()

    def bring_to(self, verb: str) -> None:
        """Does all that comes before one of `VERBS`."""
        for earlier in VERBS[: VERBS.index(verb)]:
            self.do(earlier)

    def apply(self) -> None:
        """Puts the techniques on."""
        self.applied = hookcore.apply(self.model, self.techniques)

    def call(self) -> torch.Tensor:
        """Calls the model; returns the output, on the CPU."""
        return output_of(self.model, self.x)

    def reset(self) -> None:
        """Has the techniques forget."""
        assert self.applied is not None
        self.applied.reset()

    def remove(self) -> None:
        """Takes the techniques off."""
        hookcore.remove(self.model, allow_lossy=True)  # nothing is lost: bfloat16 holds the weights exactly

    # What has to be true

    def check_call(self) -> None:
        """Sees that the next call is right, or says that it can't be."""
        with contextlib.suppress(hookcore.HookcoreError):
            self.check_output(self.call())

    def check_output(self, output: torch.Tensor) -> None:
        """Sees that an output is right for what is on the model now."""
        on = [item.technique for item in hookcore.status(self.model).attachments]
        assert len(on) in (0, len(self.techniques)), f"of the techniques, only {on} are on"
        with_techniques, bare = expected_outputs(*self._names)
        right = with_techniques if on else bare
        assert same_bits(output, right), f"wrong output, by up to {(output - right).abs().max():.3g}"

    def check_bare_output(self, model: nn.Module) -> None:
        """Sees that a copy computes what the model does, with techniques or without."""
        output = output_of(model, self.x)
        right = expected_outputs(*self._names)
        assert any(same_bits(output, it) for it in right), "wrong output of a copy"

    def stored(self) -> dict[str, torch.Tensor]:
        """The state dict that the model had at first."""
        return _stored(make_model(self._names[1]))

    def check_threads_state(self) -> None:
        """Sees that nothing is left of a call in what torch keeps for this thread."""
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        assert hooks is None, "hooks for saved tensors are left on"
        assert torch.is_grad_enabled(), "gradients are left off"
        assert not torch.is_inference_mode_enabled(), "inference mode is left on"

    def check_removal(self) -> None:
        """Sees that everything can be taken off, and the model is as it was, bit for bit."""
        self.remove()
        assert not hookcore.status(self.model).attachments, "something is left on the model"
        differences = self.before.differences(self.model)
        assert not differences, f"after removal: {'; '.join(differences[:4])}"
        self.check_output(self.call())

    def check_still_right(self) -> None:
        """Sees that calls are right, no lock is kept, and all can be removed, and put on once more."""
        self.check_threads_state()
        self.check_call()
        in_another_thread(self.check_call)
        in_another_thread(self.check_removal)
        self.apply()
        self.check_output(self.call())
        self.reset()
        self.check_output(self.call())
        self.check_removal()
        sim.check()


@functools.cache
def expected_outputs(technique: str, model: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of a model with techniques, to which nothing happens, and without."""
    with Scene(technique, model) as scene:
        bare = scene.call()
        scene.apply()
        first, second = scene.call(), scene.call()
        assert same_bits(first, second)
        return first, bare


def in_another_thread(function: Callable[[], Any]) -> None:
    """Runs a function in a thread, which finds locks that this one has kept; raises what it raised.

    Raises:
        TimeoutError: It does not end.
    """
    raised: list[BaseException] = []

    def target() -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001 - is raised in the calling thread
            raised.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    if thread.is_alive():
        raise TimeoutError(f"another thread has waited for {_SECONDS} s: a lock stays taken")
    if raised:
        raise raised[0]


def _stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with each tensor once, as `save_pretrained` writes it."""
    found = {id(tensor): (key, tensor) for key, tensor in reversed(model.state_dict(keep_vars=True).items())}
    return {key: tensor.detach() for key, tensor in reversed(found.values())}
