"""A model under techniques beside a bare twin: where the two lie, how they are called and compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from hookcore.errors import LossyRemovalError
from hookcore.stack import HookStack
from hookcore.technique import Phase
from hookcore.testing.snapshot import ModelSnapshot, same_bits

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

    from hookcore.applied import Applied
    from hookcore.technique import Technique
    from hookcore.testing.cases import ModelCase


def promise(kept: bool, what: str) -> None:
    """Raise AssertionError, with the promise, unless it was kept."""
    if not kept:
        raise AssertionError(f"broken promise: {what}")


def is_hooked(model: nn.Module) -> bool:
    """Return whether any module in it has hooks."""
    return any(map(has_hooks, model.modules()))


def has_hooks(module: nn.Module) -> bool:
    """Return whether the module itself has hooks."""
    return any(isinstance(value, HookStack) for value in vars(module).values())


class Twins:
    """What the contract and the machine share.

    Attributes:
        tolerance: How much outputs and weights may differ, relative and absolute; None for no bit.
        device: Where the models compute.
    """

    tolerance: ClassVar[float | None] = None
    device: str = "cpu"

    def build(self, case: ModelCase) -> nn.Module:
        """Build a model of the case, on the CPU; equal ones at each call."""
        return case.build()

    def home_of(self, techniques: Iterable[Technique]) -> str:
        """Return where a model lies, and its inputs come from, before these techniques are put on it.

        That is where it computes, unless one of them is to bring it there.
        """
        return "cpu" if any(item.phase is Phase.PLACE for item in techniques) else self.device

    def same_outputs(
        self,
        case: ModelCase,
        models: tuple[nn.Module, nn.Module],
        entry: str,
        seed: int,
        *,
        home: str,
        when: str,
        device: str | None = None,
    ) -> None:
        """Call the model and its bare twin; their outputs have to be the same.

        Args:
            case: What they were built from.
            models: The model and the bare one.
            entry: What to call.
            seed: Seeds the inputs.
            home: Where the model's inputs lie.
            when: At which point of the test, for the message.
            device: Where the inputs of the bare one lie; None for the device of this test.
        """
        got = case.call(models[0], entry, seed, device=home)
        expected = case.call(models[1], entry, seed, device=self.device if device is None else device)
        what = f"{entry}() gives the outputs of the bare model, {when}"
        promise(len(got) == len(expected), what)
        promise(all(map(self.same, got, expected)), what)
        promise([it.requires_grad for it in got] == [it.requires_grad for it in expected], what)

    def same(self, got: Tensor, expected: Tensor) -> bool:
        """Return whether two tensors, on whatever devices, are the same within the tolerance."""
        if self.tolerance is None:
            return same_bits(got, expected)
        got, expected = got.detach().cpu(), expected.detach().cpu()
        if got.dtype != expected.dtype or got.shape != expected.shape:
            return False
        return torch.allclose(
            got.double(), expected.double(), rtol=self.tolerance, atol=self.tolerance, equal_nan=True
        )

    def same_state(self, model: nn.Module, bare: nn.Module) -> None:
        """The state dicts of the two have to be the same; what loses bits may show another dtype."""
        got, expected = model.state_dict(), bare.state_dict()
        promise(list(got) == list(expected), f"state_dict() has the keys {list(expected)}, not {list(got)}")
        for fqn, tensor in expected.items():
            found = got[fqn] if self.tolerance is None else got[fqn].to(tensor.dtype)
            promise(self.same(found, tensor), f"state_dict() has the true {fqn!r}")

    def take_off(self, applied: Applied, model: nn.Module) -> bool:
        """Remove techniques; if they have to be allowed to lose bits, they say so before any change.

        Returns:
            Whether bits were lost.
        """
        before = ModelSnapshot.take(model)
        try:
            applied.remove()
        except LossyRemovalError:
            promise(self.tolerance is not None, "remove() loses nothing, or `tolerance` is set")
            before.assert_restored(model, same_storage=True)
            applied.remove(allow_lossy=True)
            return True
        return False

    @staticmethod
    def differences(before: ModelSnapshot, model: nn.Module, *, exact: bool) -> list[str]:
        """Return how a model differs from what it was, in values too if they have to be exact."""
        values = ("values differ", "values differ from the twin's")
        return [it for it in before.differences(model) if exact or not it.endswith(values)]


def doubled(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict with all floating-point values times two, which is exact in every dtype."""
    return {
        fqn: tensor * 2 if tensor.is_floating_point() else tensor.clone() for fqn, tensor in state.items()
    }
