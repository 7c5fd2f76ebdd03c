"""The short form of `make stress`: some inputs of each kind, without those of promises not kept yet."""

from __future__ import annotations

import os
import time

import pytest
from attrs import evolve
from stress.kinds import KINDS
from stress.runner import run

# Under any of these an interrupt or a failing request can still leave a model that moves weights half moved.
_MOVES_WEIGHTS = (
    *("'leaves'", "'blocks', model", "'budget'", "'no_stream'", "'groups_on_disk'", "'sequential'"),
    *("technique='model'", "'disk'", "'disk_to_device'", "'casting_and_leaves'"),
)
_OPEN = {
    "interrupts": _MOVES_WEIGHTS,
    "files": ("rewrite_with_old_times",),
}
"""Words in the code of inputs that are not tried here, by kind."""


def _holds(kind, item):
    return not any(word in repr(item) for word in _OPEN.get(kind.name, ()))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.short], ids=lambda kind: kind.name)
def test_no_promise_is_broken(kind):
    left = evolve(kind, inputs=lambda: (item for item in kind.inputs() if _holds(kind, item)))
    result = run(left, kind.short)
    assert result.tried >= kind.short
    assert not result.violations, "\n".join(map(str, result.violations))


class _Breaking:
    count, seconds = 1, 20.0

    def check(self):
        raise AssertionError("broken on purpose")


class _Ending(_Breaking):
    def check(self):
        os._exit(3)


class _Hanging(_Breaking):
    seconds = 0.5

    def check(self):
        time.sleep(60)


@pytest.mark.parametrize(
    ("item", "what"),
    [(_Breaking, "AssertionError: broken on purpose"), (_Ending, "ended with 3"), (_Hanging, "hangs")],
)
def test_what_breaks_a_promise_is_told(item, what):
    kind = evolve(KINDS[0], inputs=lambda: iter([item() for _ in range(3)]))
    result = run(kind, 3)
    assert result.tried == len(result.violations) == 3
    assert all(what in str(violation) for violation in result.violations)
