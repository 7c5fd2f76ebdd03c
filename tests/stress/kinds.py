"""All kinds of inputs, and how many of each are tried."""

from __future__ import annotations

from stress import faults, headers, indexes, interrupts
from stress.runner import Kind

KINDS = (
    Kind("headers", headers.inputs, least=20_000, short=1_000),
    Kind("indexes", indexes.inputs, least=2_000, short=200),
    Kind("interrupts", interrupts.inputs, least=2_000, short=100),
    Kind("faults", faults.inputs, least=500, short=60),
)
