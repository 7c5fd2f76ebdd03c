"""Every class of diffusers' models under every technique: equal, or refused with a reason, never wrong.

`make sweep` runs it. What a class is made with is in `diffusers_configs`, and which cannot be made, and why.
"""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch
from diffusers import ModelMixin
from diffusers_configs import CASES, NOT_MADE

import hookcore
from hookcore import HookcoreError
from hookcore.testing.cases import tensors_in
from hookcore_plugins import (
    AttentionBackend,
    ChannelsLast,
    DiskOffload,
    GroupOffload,
    LayerwiseCasting,
    ModelOffload,
    SequentialOffload,
    Slicing,
    Tiling,
    Trace,
)

pytestmark = pytest.mark.slow

# Each of a folder of the model's checkpoint and its inputs; bit for bit what the bare model computes.
EXACT = {
    "leaves": lambda _folder, _inputs: [GroupOffload("cpu", offload_type="leaf_level")],
    "blocks": lambda _folder, _inputs: [
        GroupOffload("cpu", offload_type="block_level", num_blocks_per_group=1)
    ],
    "sequential": lambda _folder, _inputs: [SequentialOffload("cpu")],
    "model": lambda _folder, _inputs: [ModelOffload("cpu")],
    "casting": lambda _folder, _inputs: [LayerwiseCasting("bfloat16")],
}
# The same up to rounding.
ROUNDED = {
    "disk": lambda folder, _inputs: [DiskOffload(folder)],
    "attention": lambda _folder, _inputs: [AttentionBackend("math", fallback="sdpa")],
    "channels last": lambda _folder, _inputs: [ChannelsLast()],
    "slicing": lambda _folder, _inputs: [Slicing()],
    "tiling": lambda _folder, _inputs: [Tiling(256)],  # which the image fits into
    "trace": lambda _folder, inputs: [Trace(inputs)],
}
TECHNIQUES = EXACT | ROUNDED

FAULTS = {
    (
        "MotifVideoTransformer3DModel",
        "casting",
    ): "get_parameter_dtype() of a plain module gives its storage dtype",
}
"""Classes that a technique makes fail, and why."""


def classes():
    """Names of all classes of models that diffusers brings."""
    found = {name: getattr(diffusers, name) for name in dir(diffusers) if name[0].isupper()}
    return {
        name
        for name, kind in found.items()
        if inspect.isclass(kind) and issubclass(kind, ModelMixin) and kind.__name__ == name
    } - {"ModelMixin"}


def test_every_class_is_swept_or_said_why_not():
    assert classes() == CASES.keys() | NOT_MADE.keys()
    assert not CASES.keys() & NOT_MADE.keys()
    assert all(NOT_MADE.values())


def call(model, case):
    """What a call returns; the same random numbers are drawn each time."""
    inputs = case.arguments()
    with torch.no_grad():
        return list(tensors_in(model(**inputs)))


@pytest.fixture(scope="module", params=CASES)
def swept(request, tmp_path_factory):
    """A case, what its bare model computes, and a folder that it was saved in."""
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp("saved")
    model = case.make()
    expected = call(model, case)
    assert all(torch.equal(*both) for both in zip(call(case.make(), case), expected, strict=True))
    assert any(it.is_floating_point() and it.isfinite().all() and it.any() for it in expected)
    model.save_pretrained(folder)
    return case, expected, folder


def assert_as_expected(found, expected, *, exact):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if exact:
            assert torch.equal(one, other)
        else:
            size = other.abs().max().item() if other.is_floating_point() and other.numel() else 1.0
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * size)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_class_under_a_technique_computes_the_same_or_is_refused(swept, technique, request):
    case, expected, folder = swept
    if (fault := FAULTS.get((case.name, technique))) is not None:
        request.applymarker(pytest.mark.xfail(reason=fault, raises=RuntimeError, strict=True))
    model = case.make()
    refusal = None
    try:
        hookcore.apply(model, TECHNIQUES[technique](folder, case.arguments()))
        assert_as_expected(call(model, case), expected, exact=technique in EXACT)
    except HookcoreError as error:
        refusal = str(error)
    hookcore.remove(model, allow_lossy=True)
    assert_as_expected(call(model, case), expected, exact=True)
    if refusal is not None:
        assert len(refusal) > len("refused, with no reason")
        pytest.skip(refusal)
