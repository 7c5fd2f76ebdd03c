"""Settings of all tests."""

import gc
import os

# Before anything imports a library that would read them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The models are tiny: threads cost more than they bring. torch.set_num_threads alone would be of this thread
# only: in others MKL would multiply with other kernels, which round otherwise.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # where a plugin of pytest has imported torch before

settings.register_profile("ci", deadline=None, print_blob=True)
settings.load_profile("ci")


@pytest.fixture
def few_objects_to_collect():
    """Has the tracer collect garbage without looking through all that other tests have imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
