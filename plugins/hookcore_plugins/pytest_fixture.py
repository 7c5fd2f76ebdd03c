"""The `sim` fixture: a test on the simulated accelerator. pytest finds it by the entry point `pytest11`.

It lies here, and not in `hookcore.testing`, because every pytest in an environment with hookcore imports it:
this package imports neither torch nor hookcore before a test asks for the fixture.
"""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType


@pytest.fixture
def sim() -> Iterator[ModuleType]:
    """Two simulated devices without a limit of memory, as after `simulator.reset()`, in strict mode.

    The host's use of pinned memory is watched. When the test is over, what is found late fails it too.

    Yields:
        The module `hookcore.testing.simulator`.
    """
    from hookcore.testing import simulator

    simulator.install(devices=2)
    if simulator.snapshot():
        # What an earlier test left in cycles is freed before, not in, this one; so is what the frames of a
        # failed test hold, which pytest itself forgets only after the fixtures are set up.
        for name in ("last_type", "last_value", "last_traceback", "last_exc"):
            vars(sys).pop(name, None)
        gc.collect()
    simulator.reset()
    with simulator.limited(strict=True), simulator.watching_host():
        yield simulator
        try:
            simulator.check()
        finally:
            simulator.reset()
