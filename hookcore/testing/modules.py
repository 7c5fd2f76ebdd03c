"""Random small models for property tests, as Hypothesis strategies.

The pieces are chosen for what real models do and hook engines get wrong: weights read without a call of
their module, tied weights, buffers that a forward changes, modules called twice, left out, or in
another order than they are registered, entries that call other entries. Every module takes and returns
float32 `(B, width)` and is deterministic.

A drawn `ModelCase` is a recipe, not a model: `case.build()` gives a fresh, identical model each time, so
a test has a bare twin beside the model that it hooks:

    @given(module_trees())
    def test_my_technique_is_exact(case):
        model, bare = case.build(), case.build()
        ...
        for entry in case.entries:
            assert all(map(same_bits, case.call(model, entry), case.call(bare, entry)))

The idea of drawing a recipe and building from it follows Hypothesis' own advice for mutable values.
"""

# ruff: noqa: D102 -- what a forward does is said by its class

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from attrs import frozen
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 -- the name that all of torch's users know

from hookcore.testing.cases import ModelCase

if TYPE_CHECKING:
    from collections.abc import Callable

    from hookcore.testing.cases import Arguments

BATCH = 3
"""Rows of an input: more than one, so that BatchNorm can train, and odd, so that halves are uneven."""


# Leaves: (width) -> a module without children of its own kind


def linear(width: int) -> nn.Module:
    """The plainest layer."""
    return nn.Linear(width, width)


def linear_without_bias(width: int) -> nn.Module:
    """A layer with a parameter that is None."""
    return nn.Linear(width, width, bias=False)


def layer_norm(width: int) -> nn.Module:
    """A norm with small parameters."""
    return nn.LayerNorm(width)


def batch_norm(width: int) -> nn.Module:
    """Float and integer buffers that torch changes in place while training."""
    return nn.BatchNorm1d(width)


def dropout(_width: int) -> nn.Module:
    """A module without any tensor; with p=0, so it is deterministic."""
    return nn.Dropout(0.0)


class Convolution(nn.Conv1d):
    """A convolution along the features, one channel."""

    def __init__(self, _width: int) -> None:
        super().__init__(1, 1, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unsqueeze(1)).squeeze(1)


class Lookup(nn.Embedding):
    """An embedding: adds the row of the largest feature."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x.argmax(dim=1))


class Attention(nn.MultiheadAttention):
    """Attention of the rows to each other; reads the weights of its `out_proj` without calling it."""

    def __init__(self, width: int) -> None:
        super().__init__(width, num_heads=2)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class EncoderLayer(nn.TransformerEncoderLayer):
    """A whole encoder layer; in eval mode without gradients torch reads its weights and calls no child.

    torch takes that path for an even number of heads only, hence an even width.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, nhead=2, dim_feedforward=2 * width, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x.unsqueeze(0)).squeeze(0)


class WeightReader(nn.Module):
    """Uses its child's weights without calling the child."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.child = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.child.weight, self.child.bias)


class Empty(nn.Module):
    """A parameter of size zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(0, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.nothing])


class Table(nn.Module):
    """Float and integer buffers that are read only; the float one is in no state dict."""

    table: Tensor
    order: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.rand(width), persistent=False)
        self.register_buffer("order", torch.randperm(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[self.order]


class Counter(nn.Module):
    """An integer scalar that each forward changes in place."""

    count: Tensor

    def __init__(self, _width: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x + self.count / 8


class MovingMean(nn.Module):
    """A float buffer that each forward changes in place."""

    mean: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.detach().mean(dim=0), 0.5)
        return x - self.mean


class Reassigned(nn.Module):
    """A buffer that each forward replaces by a new tensor."""

    steps: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("steps", torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        self.steps = self.steps + 1
        return x + self.steps / 8


# Containers: (width, *children) -> a module


def sequential(_width: int, *children: nn.Module) -> nn.Module:
    """The plain container, which also looks like a list of blocks."""
    return nn.Sequential(*children)


class Listed(nn.Module):
    """A ModuleList, each with a residual connection."""

    def __init__(self, _width: int, *children: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(children)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Backwards(nn.Module):
    """A ModuleDict that runs in the opposite of the order in which it is registered."""

    def __init__(self, _width: int, *children: nn.Module) -> None:
        super().__init__()
        self.steps = nn.ModuleDict({f"step_{index}": child for index, child in enumerate(children)})

    def forward(self, x: Tensor) -> Tensor:
        for step in reversed(list(self.steps.values())):
            x = step(x)
        return x


class Parallel(nn.Module):
    """Children held as plain attributes, all given the same input."""

    def __init__(self, _width: int, *children: nn.Module) -> None:
        super().__init__()
        for index, child in enumerate(children):
            self.add_module(f"branch_{index}", child)

    def forward(self, x: Tensor) -> Tensor:
        return sum((branch(x) for branch in self.children()), start=x)


class Scaled(nn.Module):
    """Parameters of its own, one a scalar, used after its children have run."""

    def __init__(self, width: int, *children: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*children)
        self.scale = nn.Parameter(torch.ones(width))
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.inner(x)
        return inner * self.scale + self.gain


class Twice(nn.Module):
    """Runs its children two times in one forward."""

    def __init__(self, _width: int, *children: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*children)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(self.inner(x))
        return out


class Staged(nn.Module):
    """Stem, repeated blocks and head, with entries beyond `forward`, as an autoencoder has.

    `forward` calls the other two entries on itself. Bit i of `skip` leaves out block i.
    """

    def __init__(self, _width: int, stem: nn.Module, head: nn.Module, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.head = head

    def encode(self, x: Tensor) -> Tensor:
        """The stem alone, `(B, width)` to `(B, width)`."""
        out: Tensor = self.stem(x)
        return out

    def decode(self, x: Tensor, skip: int = 0) -> Tensor:
        """Blocks and head, `(B, width)` to `(B, width)`."""
        for index, block in enumerate(self.blocks):
            if not skip >> index & 1:
                x = x + block(x)
        out: Tensor = self.head(x)
        return out

    def forward(self, x: Tensor, skip: int = 0) -> Tensor:
        """All of it, `(B, width)` to `(B, width)`."""
        return self.decode(self.encode(x), skip)


LEAVES: tuple[Callable[[int], nn.Module], ...] = (
    # The simplest first: Hypothesis shrinks towards it.
    linear,
    linear_without_bias,
    layer_norm,
    Convolution,
    WeightReader,
    Empty,
    Table,
    Counter,
    MovingMean,
    Reassigned,
    Lookup,
    batch_norm,
    dropout,
    Attention,
    EncoderLayer,
)
"""Every kind of leaf, called with the width."""

CONTAINERS: tuple[Callable[..., nn.Module], ...] = (sequential, Listed, Backwards, Parallel, Scaled, Twice)
"""Every kind of container, called with the width and the children."""


# Recipes


@frozen(repr=False)
class Recipe:
    """How to build one module and everything in it.

    Attributes:
        kind: Called as `kind(width, *children)`: one of `LEAVES`, `CONTAINERS` or `Staged`.
        children: The recipes of its children.
    """

    kind: Callable[..., nn.Module]
    children: tuple[Recipe, ...] = ()

    def __repr__(self) -> str:
        children = f", {self.children!r}" if self.children else ""
        return f"Recipe({self.kind.__name__}{children})"

    def build(self, width: int) -> nn.Module:
        """Build the module from torch's global random state."""
        return self.kind(width, *(child.build(width) for child in self.children))


@frozen
class Tie:
    """Two linear layers of a model that share memory.

    Attributes:
        how: What they share. "module": the same module stands at both places. "parameter": the same weight
            object. "transpose": the second weight is a view of the first's memory, transposed. "row": the
            second bias is a view of one row of the first weight.
        first: Index of the first layer among the model's linear layers, counted on from the start at the end.
        step: The second is the layer `step` + 1 places after the first, counted the same way.
    """

    how: Literal["module", "parameter", "transpose", "row"]
    first: int
    step: int

    def apply(self, model: nn.Module, width: int) -> None:
        """Ties the layers in place; nothing happens in a model with fewer than two."""
        linears = {
            fqn: module
            for fqn, module in model.named_modules(remove_duplicate=False)
            if type(module) is nn.Linear and module.weight.shape == (width, width)
        }
        if len(linears) < 2:
            return
        fqns = list(linears)
        first_fqn = fqns[self.first % len(fqns)]
        second_fqn = fqns[(self.first + 1 + self.step % (len(fqns) - 1)) % len(fqns)]
        first, second = linears[first_fqn], linears[second_fqn]
        match self.how:
            case "module":
                model.set_submodule(second_fqn, first)
            case "parameter":
                second.weight = first.weight
            case "transpose":
                second.weight = nn.Parameter(first.weight.detach().t())
            case "row":
                second.bias = nn.Parameter(first.weight.detach()[-1])


@frozen
class TreeModel:
    """The blueprint of a random model.

    Attributes:
        tree: The modules.
        width: Features of every input and output; even.
        ties: What shares memory, applied in order.
        freeze_every: Every n-th parameter gets `requires_grad=False`; 0 for none.
        training: The mode of the model.
        skips_blocks: Inputs of a `Staged` model leave out random blocks, other ones for each seed.
    """

    tree: Recipe
    width: int
    ties: tuple[Tie, ...] = ()
    freeze_every: int = 0
    training: bool = False
    skips_blocks: bool = False

    def make(self) -> nn.Module:
        """Build the model; draws weights from torch's global random state."""
        model = self.tree.build(self.width)
        # Every tensor gets values of its own, so that a norm's weight in the place of another's shows.
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                nn.init.uniform_(buffer, 0.5, 1.5)  # a running variance must be positive
        for tie in self.ties:
            tie.apply(model, self.width)
        if self.freeze_every:
            for parameter in list(model.parameters())[:: self.freeze_every]:
                parameter.requires_grad_(False)
        return model.train(self.training)

    @property
    def entries(self) -> tuple[str, ...]:
        """The methods that can be called."""
        return ("forward", "encode", "decode") if self.tree.kind is Staged else ("forward",)

    def make_inputs(self, entry: str, generator: torch.Generator) -> Arguments:
        """Return x `(BATCH, width)` and, where blocks are left out, which ones."""
        x = torch.randn(BATCH, self.width, generator=generator)
        if not self.skips_blocks or self.tree.kind is not Staged or entry == "encode":
            return (x,), {}
        _stem, _head, *blocks = self.tree.children
        return (x,), {"skip": int(torch.randint(2 ** len(blocks), (), generator=generator))}


# Strategies


def leaves() -> st.SearchStrategy[Recipe]:
    """Recipes of one leaf."""
    return st.sampled_from(LEAVES).map(Recipe)


def trees(max_leaves: int = 4) -> st.SearchStrategy[Recipe]:
    """Recipes of nested containers with at most that many leaves, or of one leaf."""

    def containers(children: st.SearchStrategy[Recipe]) -> st.SearchStrategy[Recipe]:
        return st.builds(
            Recipe, st.sampled_from(CONTAINERS), st.lists(children, min_size=1, max_size=3).map(tuple)
        )

    return st.recursive(leaves(), containers, max_leaves=max_leaves)


def staged_trees() -> st.SearchStrategy[Recipe]:
    """Recipes of `Staged` models with one to four blocks of one kind."""

    def staged(stem: Recipe, head: Recipe, block: Recipe, count: int) -> Recipe:
        return Recipe(Staged, (stem, head, *[block] * count))

    return st.builds(staged, trees(2), trees(2), trees(2), st.integers(1, 4))


def ties() -> st.SearchStrategy[Tie]:
    """Ties between any two linear layers."""
    return st.builds(
        Tie,
        st.sampled_from(["parameter", "module", "transpose", "row"]),
        first=st.integers(0, 3),
        step=st.integers(0, 2),
    )


def module_trees() -> st.SearchStrategy[ModelCase]:
    """Random small models, each with its inputs and entries.

    They shrink to one `nn.Linear` in eval mode.
    """
    blueprints = st.builds(
        TreeModel,
        tree=st.one_of(trees(), staged_trees()),
        width=st.sampled_from(range(4, 17, 2)),
        ties=st.lists(ties(), max_size=2).map(tuple),
        freeze_every=st.integers(0, 2),
        training=st.booleans(),
        skips_blocks=st.booleans(),
    )
    return st.builds(ModelCase, blueprints, seed=st.integers(0, 2**16))
