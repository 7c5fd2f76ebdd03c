"""Hostile files, interrupts, faults, forks, threads and long use of hookcore; see `__main__`."""

import os

# Before anything imports torch: a forked child would wait for ever for the threads of its parent's kernels.
os.environ.setdefault("OMP_NUM_THREADS", "1")
