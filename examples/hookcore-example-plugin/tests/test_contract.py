"""What every technique promises, of this one."""

# ruff: noqa: ANN201, D101, D102

from __future__ import annotations

import torch
from hookcore_example_plugin import ActivationStatistics

from hookcore.testing import TechniqueContract

torch.set_num_threads(1)


class TestActivationStatistics(TechniqueContract):
    devices = ("cpu", "sim")

    def make(self):
        return ActivationStatistics()
