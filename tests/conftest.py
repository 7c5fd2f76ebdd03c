"""Settings of all tests."""

import os

# Before anything imports a library that would read it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from hypothesis import settings

torch.set_num_threads(1)  # the models are tiny: threads cost more than they bring

settings.register_profile("ci", deadline=None, print_blob=True)
settings.load_profile("ci")
