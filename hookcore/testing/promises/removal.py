"""What a technique promises of its removal."""

from __future__ import annotations

from hypothesis import strategies as st

import hookcore
from hookcore.errors import ConflictError
from hookcore.technique import Phase
from hookcore.testing.promises.base import Promises, on_random_models
from hookcore.testing.promises.others import calls_of, make_recording
from hookcore.testing.snapshot import ModelSnapshot
from hookcore.testing.twins import promise


class RemovalPromises(Promises):
    """The model is given back."""

    @on_random_models
    def test_removal_gives_the_model_back(self, data: st.DataObject) -> None:
        """Every object, attribute, dtype, device and tie; every bit, unless it says before that it cannot."""
        case, model, bare = self.draw_pair(data)
        before = ModelSnapshot.take(model, twin=bare)
        applied = self.apply(model)
        if data.draw(st.booleans(), label="called"):
            self.call_both(case, model, bare)
        self.remove(applied, model)
        self.is_restored(before, model)
        self.call_both(case, model.to(self.device), bare, home=self.device)
        applied.remove()
        promise(not hookcore.status(model).attachments, "a second remove() does nothing")

    @on_random_models
    def test_it_can_be_applied_again(self, data: st.DataObject) -> None:
        """Applied, removed and applied: as if for the first time."""
        case, model, bare = self.draw_pair(data)
        before = ModelSnapshot.take(model, twin=bare)
        applied = self.apply(model)
        if data.draw(st.booleans(), label="called the first time"):
            self.call_both(case, model, bare)
        self.remove(applied, model)
        lost = self._lost
        applied = hookcore.apply(model, [self.make()])  # no model is refused that was taken before
        self.call_both(case, model, bare)
        self.remove(applied, model)
        self._lost |= lost
        self.is_restored(before, model)

    @on_random_models
    def test_removal_in_any_order_beside_another_technique(self, data: st.DataObject) -> None:
        """Another technique on the same modules, put on and taken off first or last, outside or inside."""
        case, model, bare = self.draw_pair(data)
        before = ModelSnapshot.take(model, twin=bare)
        calls: set[str] = set()
        phases = [self.make().phase, *Phase]  # its own first: so close they meet most often
        make = make_recording(data.draw(st.sampled_from(phases), label="phase of the other"))
        other = make(calls)
        other_first = data.draw(st.booleans(), label="the other is put on first")
        if other_first:
            others = hookcore.apply(model, [other])
        applied = self.apply(model)
        if not other_first:
            try:
                others = hookcore.apply(model, [other])
            except ConflictError:
                promise(self.hides_modules, "a technique is not refused that claims nothing")
                self.call_both(case, model, bare)
                return
        self.call_both(case, model, bare)
        expected = calls_of(case, self.build(case).to(self.device), make, self.device)
        promise(expected <= calls, f"hooks of other techniques are called at {sorted(expected - calls)}, too")
        if data.draw(st.booleans(), label="the other is taken off first"):
            others.remove()
            self.call_both(case, model, bare)
            self.remove(applied, model)
        else:
            self.remove(applied, model)
            if self.home == self.device:
                self.call_both(case, model, bare)
            others.remove()
        self.is_restored(before, model)
