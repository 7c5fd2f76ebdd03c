"""The project's own techniques keep the contract, on the CPU and on the simulated accelerator."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from attrs import field, frozen
from autoencoders import Pointwise
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F  # noqa: N812

import hookcore
from hookcore import Phase, Technique
from hookcore.testing import HookMachine, ModelCase, TechniqueContract
from hookcore.testing.modules import (
    Attention,
    Backwards,
    Listed,
    Lookup,
    Parallel,
    Reassigned,
    Recipe,
    TreeModel,
    WeightReader,
    layer_norm,
    linear,
    linear_without_bias,
    module_trees,
    sequential,
)
from hookcore_plugins import (
    AttentionBackend,
    ChannelsLast,
    Compile,
    DiskOffload,
    GroupOffload,
    LayerwiseCasting,
    ModelOffload,
    SequentialOffload,
    Slicing,
    Tiling,
    Trace,
)


def nested(*leaves):
    """Models of these leaves, in which nothing is read outside of its call and no step makes errors large."""
    kinds = st.sampled_from(leaves).map(Recipe)

    def containers(children):
        lists = st.lists(children, min_size=1, max_size=3).map(tuple)
        return st.builds(Recipe, st.sampled_from([sequential, Listed, Backwards]), lists)

    trees = containers(kinds | containers(kinds))
    blueprints = st.builds(TreeModel, trees, st.sampled_from([4, 8]), freeze_every=st.integers(0, 2))
    return st.builds(ModelCase, blueprints, seed=st.integers(0, 99))


def shallow(*leaves):
    """Models of one to three of these leaves, for techniques that take long to apply."""
    lists = st.lists(st.sampled_from(leaves).map(Recipe), min_size=1, max_size=3).map(tuple)
    trees = st.builds(Recipe, st.sampled_from([sequential, Listed, Backwards]), lists)
    blueprints = st.builds(TreeModel, trees, st.just(4), freeze_every=st.integers(0, 2))
    return st.builds(ModelCase, blueprints, seed=st.integers(0, 9))


READS_OTHERS = (WeightReader, nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that read the weights of modules inside them without calling these."""


def own_tensors(module):
    """The parameters and buffers that a module holds itself."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


class OnBoth(TechniqueContract):
    devices = ("cpu", "sim")


# Layerwise casting


class ExactInFloat8:
    """Models with weights that float8 holds exactly, so that whatever is wrong shows."""

    tolerance = 1e-6

    def build(self, case):
        model = case.build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(torch.float8_e4m3fn))
        return model

    def models(self):
        return nested(linear, linear_without_bias, layer_norm, Lookup)


class TestCastingToFloat8(ExactInFloat8, OnBoth):
    def make(self):
        return LayerwiseCasting(torch.float8_e4m3fn)


class TestCastingThatKeepsOriginals(OnBoth):
    """Outputs of two layers at most, so that rounding stays small; weights are back in every bit."""

    tolerance = 0.5

    def make(self):
        return LayerwiseCasting(torch.float8_e4m3fn, keep_originals=True)

    def models(self):
        trees = [Recipe(linear), Recipe(sequential, (Recipe(linear_without_bias), Recipe(layer_norm)))]
        blueprints = st.builds(TreeModel, st.sampled_from(trees), st.sampled_from([4, 6]))
        return st.builds(ModelCase, blueprints, seed=st.integers(0, 9))


class TestCastingToBfloat16(TestCastingToFloat8):
    devices = ("sim",)

    def make(self):
        return LayerwiseCasting(torch.bfloat16, torch.float32, non_blocking=True)


# Offloading


class TestGroupOffloadOfBlocks(TechniqueContract):
    devices = ("sim",)

    def make(self):
        return GroupOffload(self.device, offload_type="block_level", use_stream=False)


class TestGroupOffloadOfLeaves(OnBoth):
    def make(self):
        return GroupOffload(self.device, offload_type="leaf_level", use_stream=False)

    def peak_bound(self, model):
        """One layer at a time, and what the modules around it hold themselves."""
        owners = Counter(id(it) for module in model.modules() for it in own_tensors(module))
        tied = any(count > 1 for count in owners.values())
        twice = (*READS_OTHERS, Reassigned)  # what a call replaces is there as long as what replaces it
        if tied or any(isinstance(module, twice) for module in model.modules()):
            return None
        held = {fqn: sum(it.nbytes for it in own_tensors(module)) for fqn, module in model.named_modules()}
        paths = (["", *(fqn[:end] for end, char in enumerate(fqn) if char == "."), fqn] for fqn in held)
        return max(sum(held[it] for it in dict.fromkeys(path)) for path in paths)


class TestStreamedGroups(TechniqueContract):
    devices = ("sim",)

    def make(self):
        return GroupOffload(self.device)


class TestStreamedBlocks(TechniqueContract):
    devices = ("sim",)

    def make(self):
        return GroupOffload(self.device, offload_type="block_level", prefetch=2)


class TestStreamedGroupsWithABudget(TechniqueContract):
    devices = ("sim",)

    def make(self):
        return GroupOffload(self.device, memory_budget=1500)

    def peak_bound(self, model):
        if any(isinstance(module, Reassigned) for module in model.modules()):
            return None  # what a call replaces is there as long as what replaces it
        return 1500


class TestSequentialOffload(OnBoth):
    def make(self):
        return SequentialOffload(self.device)


class TestModelOffload(OnBoth):
    def make(self):
        return ModelOffload(self.device)

    def peak_bound(self, model):
        """All of it, each weight where it can be read in wide steps, as many times as it has memory."""
        return sum(-(-it.nbytes // 64) * 64 + 64 for it in (*model.parameters(), *model.buffers()))


@frozen
class Streamed(Technique):
    """Has `load` leave weights in their files."""

    name: ClassVar[str] = "streamed"
    phase: ClassVar[Phase] = Phase.PLACE
    materializes: ClassVar[bool] = True

    checkpoint: object = field(default=None)

    def bind(self, component):
        return []


class FromCheckpoints:
    """Builds models of which each has its weights in a checkpoint of its own, and knows it."""

    folder = None

    def build(self, case):
        bare = case.build()
        if case not in self.folders:
            self.folders[case] = Path(tempfile.mkdtemp(dir=self.all_folders))
            stored = {
                name: tensor.detach().clone(memory_format=torch.contiguous_format)
                for name, tensor in bare.state_dict().items()
            }
            save_file(stored, self.folders[case] / "model.safetensors")
        self.folder = self.folders[case]
        init = {"__init__": lambda self: vars(self).update(vars(case.build()))}
        model = hookcore.load(type("Drawn", (type(bare),), init), self.folder, [Streamed()])
        hookcore.remove(model)
        model.__class__ = type(bare)
        return model.train(bare.training)


# A submodule without weights is offered the checkpoint of the whole model.
@pytest.mark.filterwarnings("ignore:the checkpoint in .* tensors that .* lacks:hookcore.HookcoreWarning")
class TestDiskOffload(FromCheckpoints, OnBoth):
    options: ClassVar[dict] = {}

    @pytest.fixture(autouse=True)
    def _folders(self, tmp_path):
        self.folders = {}
        self.all_folders = tmp_path

    def make(self):
        return DiskOffload(self.folder, execution_device=self.device, **self.options)


class TestDiskOffloadWithABudget(TestDiskOffload):
    devices = ("sim",)
    options: ClassVar[dict] = {"memory_budget": "64KiB", "read_ahead": "16KiB"}


class TestGroupsOnDisk(OnBoth):
    """Written to files of the technique's own."""

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path):
        self.folder = tmp_path

    def make(self):
        return GroupOffload(self.device, offload_to_disk_path=self.folder)

    def models(self):
        """Those whose weights a file can hold as they lie: neither transposed nor parts of others."""
        return module_trees().filter(
            lambda case: not any(tie.how in {"transpose", "row"} for tie in case.blueprint.ties)
        )


# Slicing and tiling


class TestSlicing(OnBoth):
    """One row at a time: sums over one row at a time are rounded otherwise than those over three.

    Models of few layers, whose gradients are no larger than what they are rounded to can be told from.
    """

    tolerance = 1e-5

    def make(self):
        return Slicing()

    def models(self):
        leaves = st.sampled_from([linear, linear_without_bias, layer_norm, Lookup]).map(Recipe)
        containers = st.sampled_from([sequential, Listed, Backwards])
        pairs = st.builds(Recipe, containers, st.tuples(leaves, leaves))
        blueprints = st.builds(
            TreeModel, leaves | pairs, st.sampled_from([4, 8]), st.just(()), st.integers(0, 2)
        )
        return st.builds(ModelCase, blueprints, seed=st.integers(0, 99))


class TestTilingWithTheWholeInView(OnBoth):
    """Of models that compute each pixel by itself, so that tiles can be put together with no difference."""

    tolerance = 1e-5

    def make(self):
        return Tiling(8, 4)

    def models(self):
        return st.builds(ModelCase, st.builds(Pointwise, st.sampled_from([4, 6])), seed=st.integers(0, 9))

    # What is made of several autoencoders is none, and neither are its parts.
    test_modules_are_called_in_any_order = None
    test_it_works_on_a_submodule = None


class TestTiling(TestTilingWithTheWholeInView):
    devices = ("sim",)

    def make(self):
        return Tiling((8, 10), 2, context="tile")


# Attention


class Attending(nn.Linear):
    """Attention of the rows to each other, as people write it."""

    def __init__(self, width):
        super().__init__(width, 3 * width)

    def forward(self, x):
        query, key, value = super().forward(x).unsqueeze(0).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(query, key, value).squeeze(0)


class TestAttentionOfTorchsOwnChoice(TechniqueContract):
    """What torch would compute without it, in every bit."""

    def make(self):
        return AttentionBackend("sdpa")

    def models(self):
        return nested(Attending)


class TestChunkedAttention(OnBoth):
    """Models of two attentions at most, so that errors stay small."""

    tolerance = 1e-4

    def make(self):
        return AttentionBackend("chunked")

    def models(self):
        trees = [
            Recipe(Attending),
            Recipe(Attention),
            Recipe(Listed, (Recipe(Attention), Recipe(linear))),
            Recipe(sequential, (Recipe(linear), Recipe(Attending), Recipe(layer_norm))),
            Recipe(Parallel, (Recipe(Attending), Recipe(Attention))),
        ]
        blueprints = st.builds(TreeModel, st.sampled_from(trees), st.sampled_from([4, 6]))
        return st.builds(ModelCase, blueprints, seed=st.integers(0, 9))


# Memory format, tracing, compiling


class Picture(nn.Module):
    """A convolution of the batch as one picture, 2D or 3D, in float64: kernels then differ by little."""

    dimensions = 2

    def __init__(self, width):
        super().__init__()
        kind = (nn.Conv2d, nn.ConvTranspose3d)[self.dimensions - 2]
        self.convolution = kind(3, 3, 3, padding=1, groups=3, dtype=torch.float64)

    def forward(self, x):
        picture = x.double().expand(2, 3, *[2] * (self.dimensions - 2), *x.shape)
        return x + self.convolution(picture).flatten(2).mean(2).sum().to(x.dtype)


class Film(Picture):
    dimensions = 3


class TiedPictures(nn.Module):
    """Two convolutions with one weight, and one whose weight is a view of a part of larger memory."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second, self.third = Picture(width), Picture(width), Picture(width)
        self.second.convolution.weight = self.first.convolution.weight
        memory = torch.rand(2, *self.third.convolution.weight.shape, dtype=torch.float64)
        self.third.convolution.weight = nn.Parameter(memory[1])

    def forward(self, x):
        return self.third(self.second(self.first(x)))


class TestChannelsLast(OnBoth):
    tolerance = 1e-5

    def make(self):
        return ChannelsLast()

    def models(self):
        return shallow(Picture, Film, TiedPictures, linear)


class TestTrace(TechniqueContract):
    tolerance = 1e-5
    hides_modules = True
    example = None

    def build(self, case):
        self.example = case.inputs(seed=1)[0]
        return super().build(case)

    def make(self):
        return Trace(self.example or (torch.zeros(3, 4),))

    def models(self):
        return shallow(linear, layer_norm, Picture, Attention)


class TestCompile(TechniqueContract):
    hides_modules = True

    def make(self):
        return Compile(backend="eager")

    def models(self):
        return shallow(linear, linear_without_bias, layer_norm)


@pytest.mark.slow
class TestCompileOnTheSimulator(TestCompile):
    devices = ("sim",)


# In any order


class Offloads(HookMachine):
    """On a model that lies on the CPU, as users have it."""

    def techniques(self):
        return [
            GroupOffload(self.device),
            GroupOffload(self.device, offload_type="leaf_level"),
            *([GroupOffload(self.device, memory_budget=2000)] if self.device == "sim" else []),
            SequentialOffload(self.device),
            ModelOffload(self.device),
        ]


class OffloadsFromTheDevice(Offloads):
    """On a model that is on the device from the beginning, and on modules in it."""

    def home_of(self, techniques):
        return self.device

    def models(self):
        """Without ties: a weight has to be brought for all its users, so they are offloaded together."""
        return module_trees().filter(lambda case: not case.blueprint.ties)

    def targets(self):
        """Nothing inside of a module that reads weights there: nobody would bring them for it."""
        modules = dict(self.model.named_modules())
        readers = [module for module in modules.values() if isinstance(module, READS_OTHERS)]
        inside = {it for reader in readers for it in reader.modules() if it is not reader}
        return [fqn for fqn, module in modules.items() if module not in inside]


class OffloadsAndCasting(ExactInFloat8, OffloadsFromTheDevice):
    def techniques(self):
        casting = [LayerwiseCasting(torch.float8_e4m3fn, keep_originals=keep) for keep in (False, True)]
        return [GroupOffload(self.device, offload_type="leaf_level"), *casting]


class AttentionAndOffloads(ExactInFloat8, OffloadsFromTheDevice):
    """And casting."""

    tolerance = 1e-4

    def models(self):
        return TestChunkedAttention().models()

    def techniques(self):
        return [
            AttentionBackend("chunked"),
            GroupOffload(self.device, offload_type="leaf_level"),
            LayerwiseCasting(torch.float8_e4m3fn),
        ]


class Compiled(ExactInFloat8, OffloadsFromTheDevice):
    """Blocks compiled on the model or a part of it, with hooks that come and go around and inside."""

    def techniques(self):
        return [
            Compile(backend="eager"),
            ChannelsLast(),
            GroupOffload(self.device, offload_type="leaf_level"),
            LayerwiseCasting(torch.float8_e4m3fn),
        ]

    def models(self):
        leaves = st.sampled_from([linear, layer_norm, Lookup, Picture]).map(Recipe)
        blocks = st.builds(Recipe, st.just(sequential), st.tuples(leaves, leaves))
        count = st.integers(2, 3)
        trees = st.builds(lambda block, count: Recipe(Listed, (block,) * count), blocks, count)
        blueprints = st.builds(TreeModel, trees, st.just(4), freeze_every=st.integers(0, 2))
        return st.builds(ModelCase, blueprints, seed=st.integers(0, 9))

    @rule(data=st.data(), seed=st.integers(0, 3))
    def put_several_on(self, data, seed):
        """In any order, each on the model or on a part of it, and calls."""
        for technique in data.draw(st.permutations(self.techniques()), label="techniques"):
            target = st.sampled_from(["", "", "", *self.targets()])
            self.put_on(technique, data.draw(target, label="target"))
            self.call_entry("forward", seed)

    def fail_entry(self, entry, seed, fqn):
        """Compiled code does not see that somebody has hooked a module in it."""
        if not any(item.technique.name == "compile" for item in self.items):
            super().fail_entry(entry, seed, fqn)


class Disk(FromCheckpoints, HookMachine):
    def __init__(self):
        super().__init__()
        self.folders = {}
        self.all_folders = self._cleanup.enter_context(tempfile.TemporaryDirectory())

    def techniques(self):
        kinds = [{}, {"memory_budget": "64KiB", "read_ahead": "16KiB"}]
        return [DiskOffload(self.folder, execution_device=self.device, **options) for options in kinds]


# A submodule without weights is offered the checkpoint of the whole model.
@pytest.mark.filterwarnings("ignore:the checkpoint in .* tensors that .* lacks:hookcore.HookcoreWarning")
@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize(
    "machine", [Offloads, OffloadsFromTheDevice, OffloadsAndCasting, AttentionAndOffloads, Compiled, Disk]
)
def test_any_sequence_of_steps(machine, device):
    there = type(machine.__name__, (machine,), {"device": device})
    run_state_machine_as_test(there, settings=settings(there.TestCase.settings, max_examples=6))
