"""What a technique promises of the memory of a device."""

from __future__ import annotations

import contextlib
import gc
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import reject

from hookcore.testing.promises.base import SEED, Promises, on_random_models
from hookcore.testing.twins import promise

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hypothesis import strategies as st
    from torch import nn

    from hookcore.testing.cases import ModelCase


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Return what earlier tests left in cycles is not freed while memory is counted."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class MemoryPromises(Promises):
    """Counted on the simulator, to the byte."""

    def peak_bound(self, model: nn.Module) -> int | None:
        """Bytes of weights that may be on the device at once during a call.

        Args:
            model: A bare model, as `models()` draws them.

        Returns:
            The bound, or None if nothing is promised for this model.
        """
        return None

    def prepare(self, request: pytest.FixtureRequest) -> None:
        """Skip what there is nothing to count for."""
        test = request.function.__name__
        if test in _COUNTING and not self.on_simulator:
            pytest.skip('memory is counted on the simulator: have devices = ("cpu", "sim")')
        if test == "test_peaks_are_bounded" and type(self).peak_bound is MemoryPromises.peak_bound:
            pytest.skip("peak_bound() is not defined")
        super().prepare(request)

    @on_random_models
    def test_no_device_memory_is_left(self, data: st.DataObject) -> None:
        """After removal, and once its handle is gone, the device holds what it held before, at once."""
        case = self.draw(data)
        with _no_garbage_collection():
            model = self.build(case).to(self.home)
            before = self._allocated()
            applied = self.apply(model)
            self._peaks(case, model, self.entries(case, model), self.home)
            self.remove(applied, model)
            del applied  # it holds the model's tensors, also those that a call has replaced since
            left = self._allocated() - before
        promise(left == 0, f"remove() leaves no memory on {self.device}, not {left} bytes: {self._holders()}")

    @on_random_models
    def test_peaks_are_bounded(self, data: st.DataObject) -> None:
        """A call takes no more than `peak_bound` and what the bare model's call takes beside its weights."""
        case = self.draw(data)
        bare = self.build(case)
        bound = self.peak_bound(bare)
        if bound is None:
            reject()
        entries = self.entries(case, bare)
        with _no_garbage_collection():
            bare.to(self.device)
            at_rest = self._allocated()
            beside = [peak - at_rest for peak in self._peaks(case, bare, entries, self.device)]
            start = self._allocated()
            model = self.build(case).to(self.home)
            self.apply(model)
            for _ in range(2):
                peaks = self._peaks(case, model, entries, self.home)
                for entry, peak, activations in zip(entries, peaks, beside, strict=True):
                    weights = peak - start - activations
                    what = f"at most {bound} bytes of weights on {self.device} at once, not {weights}"
                    promise(weights <= bound, f"{entry}() has {what}")

    def _peaks(self, case: ModelCase, model: nn.Module, entries: tuple[str, ...], device: str) -> list[int]:
        """The most bytes on the device during a call of each entry."""
        module = torch.get_device_module(self.device)
        peaks = []
        for entry in entries:
            module.reset_peak_memory_stats()
            with torch.no_grad():
                case.call(model, entry, SEED, device=device)
            peaks.append(int(module.max_memory_allocated()))
        return peaks

    def _allocated(self) -> int:
        return int(torch.get_device_module(self.device).memory_allocated())

    @staticmethod
    def _holders() -> str:
        from hookcore.testing import simulator

        return "; ".join(map(str, simulator.snapshot()[:3]))


_COUNTING = ("test_no_device_memory_is_left", "test_peaks_are_bounded")
