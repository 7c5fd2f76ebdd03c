"""All kinds of inputs, and how many of each are tried."""

from __future__ import annotations

from stress import faults, files, forks, headers, indexes, interrupts, soak, threads
from stress.runner import Kind

# None of the faults is tried in the normal suite, as what moves weights does not survive all of them yet.
KINDS = (
    Kind("headers", headers.inputs, least=20_000, short=400),
    Kind("indexes", indexes.inputs, least=2_000, short=60),
    Kind("interrupts", interrupts.inputs, least=2_000, short=24),
    Kind("faults", faults.inputs, least=500, short=0),
    Kind("forks", forks.inputs, least=200, short=6),
    Kind("files", files.inputs, least=500, short=20),
    Kind("threads", threads.inputs, least=2_400, short=80),
    Kind("soak", soak.inputs, least=10_000, short=250),
)
