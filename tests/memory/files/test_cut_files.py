"""A file that is cut short under a model never ends the process where hookcore can tell in time."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHILD = """
import contextlib, copy, io, os, pickle, sys

import torch
from safetensors.torch import save_file
from torch import nn

import hookcore
import hookcore.testing.simulator as sim
from hookcore_plugins import DiskOffload, GroupOffload, LayerwiseCasting

sim.install()
way, device, dtype, folder = sys.argv[1:]
path = f"{folder}/model.safetensors"


class Model(nn.Sequential):
    def __init__(self):
        super().__init__(*(nn.Linear(128, 128) for _ in range(8)))


model = Model()
bare = copy.deepcopy(model)
save_file(model.state_dict(), path)
if way == "loaded":
    technique = DiskOffload(execution_device=device)
    model = hookcore.load(Model, path, [technique], torch_dtype=dtype)
elif way == "in memory":
    hookcore.apply(model, [DiskOffload(path, execution_device=device)])
else:
    os.remove(path)
    hookcore.apply(model, [GroupOffload(device, offload_to_disk_path=folder)])
    (name,) = os.listdir(folder)
    path = f"{folder}/{name}"
x = torch.ones(1, 128, dtype=getattr(torch, dtype) if way == "loaded" else None)
with torch.no_grad():
    before = model(x)
with open(path, "rb") as file:
    data = file.read()
times = os.stat(path)
os.truncate(path, 5000)


def parameters():
    return [it.clone() for it in model.parameters()]


def each():
    return [layer.weight.sum() for layer in model]


found = {}
for number, attempt in enumerate((
    lambda: model(x),
    lambda: model[1](x),
    lambda: {name: it.clone() for name, it in model.state_dict().items()},
    parameters,
    each,
    lambda: copy.deepcopy(model),
    lambda: copy.deepcopy(model[1].weight),
    lambda: pickle.dumps(model),
    lambda: torch.save(model, io.BytesIO()),
    lambda: model.load_state_dict(bare.state_dict()),
    lambda: model(x),
)):
    try:
        with torch.no_grad():
            attempt()
    except hookcore.CheckpointError as error:
        assert "5000 bytes" in str(error), error
    else:
        raise AssertionError(f"attempt {number} went through")
casting = None
with contextlib.suppress(hookcore.CheckpointError):  # nothing need be read for it
    casting = hookcore.apply(model, [LayerwiseCasting(torch.bfloat16, keep_originals=True)])
print(hookcore.status(model), hookcore.status(model).nbytes)
try:
    hookcore.remove(model, allow_lossy=True)
except hookcore.CheckpointError as error:
    assert way != "loaded" or dtype != "float32"
    assert "Put the original file back and remove again" in str(error) or way == "loaded", error
    assert hookcore.status(model).attachments
    with open(path, "r+b") as file:
        file.truncate(len(data))
        file.write(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with torch.no_grad():
        assert torch.equal(model(x), before)
    hookcore.remove(model, allow_lossy=True)
    assert way == "loaded" or all(
        torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), bare.parameters(), strict=True)
    )
assert not hookcore.status(model).attachments
print("survived")
"""


@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize(
    ("way", "dtype"),
    [("loaded", "float32"), ("loaded", "bfloat16"), ("in memory", "float32"), ("written", "float32")],
)
def test_the_process_survives_and_is_told(way, device, dtype, tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", CHILD, way, device, dtype, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.endswith("survived\n")
