"""Models that are compiled as a whole after techniques are on them compute the same, and so when those go."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hookcore
from hookcore_plugins import (
    AttentionBackend,
    ChannelsLast,
    GroupOffload,
    LayerwiseCasting,
    SequentialOffload,
    Slicing,
    Trace,
)


class Attending(nn.Module):
    """A layer, and attention."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        x = self.linear(x)
        return x + nn.functional.scaled_dot_product_attention(x, x, x)


X = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
TECHNIQUES = {
    "attention": lambda: AttentionBackend("math"),
    "blocks": lambda: GroupOffload("cpu", offload_type="leaf_level"),
    "casting": lambda: LayerwiseCasting("bfloat16"),
    "channels last": ChannelsLast,
    "sequential": lambda: SequentialOffload("cpu"),
    "slicing": Slicing,
    "trace": lambda: Trace((X,)),
}
COMPILED = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "model.compile": lambda model: model.compile(backend="eager") or model,
}


@pytest.mark.parametrize("how", COMPILED)
@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.filterwarnings("ignore:Dynamo does not know")
def test_a_model_that_is_compiled_after_a_technique_was_applied_computes_the_same(technique, how):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = nn.Sequential(Attending(), Attending()).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
        bare = model(X)
        applied = hookcore.apply(model, [TECHNIQUES[technique]()])
        compiled = COMPILED[how](model)
        for _ in range(2):
            torch.testing.assert_close(compiled(X), bare, rtol=1e-4, atol=1e-5)
        applied.remove(allow_lossy=True)
        torch.testing.assert_close(compiled(X), bare, rtol=1e-4, atol=1e-5)
