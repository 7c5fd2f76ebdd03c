"""hookcore puts memory-saving techniques on any torch module or diffusers pipeline, and takes them off.

```python
import hookcore

applied = hookcore.apply(model, ["layerwise_casting"])
...
applied.remove()
```
"""

from __future__ import annotations

from hookcore.applied import Applied, Status
from hookcore.apply import apply, plan, remove, status
from hookcore.attention import AttentionCall, AttentionFunction, Objection
from hookcore.conventions import ForeignMechanism, ModelConventions, OpenedTarget
from hookcore.errors import (
    BudgetError,
    CheckpointError,
    ConcurrentCallError,
    ConflictError,
    HookcoreError,
    HookcoreWarning,
    HookSite,
    LossyRemovalError,
    OrderError,
    PlanError,
    PluginError,
    UnsupportedModelError,
)
from hookcore.hook import Hook
from hookcore.hookspecs import hookimpl
from hookcore.loading import load
from hookcore.plan import Plan, PlanStep
from hookcore.plugins import attention_functions
from hookcore.refused_methods import refuse_meanwhile
from hookcore.run_report import RunEntry, RunReport
from hookcore.skeleton import skeleton_of
from hookcore.stack import bare_entry
from hookcore.target import Component, Target, TensorSlot
from hookcore.technique import Binding, Claim, JointTechnique, Phase, Resource, Skipped, Technique
from hookcore.units import (
    format_bytes,
    parse_bytes,
    parse_device,
    parse_dtype,
    parse_kwarg_names,
    parse_module_names,
    parse_onload_device,
)

__version__ = "0.1.0"

__all__ = [
    "Applied",
    "AttentionCall",
    "AttentionFunction",
    "Binding",
    "BudgetError",
    "CheckpointError",
    "Claim",
    "Component",
    "ConcurrentCallError",
    "ConflictError",
    "ForeignMechanism",
    "Hook",
    "HookSite",
    "HookcoreError",
    "HookcoreWarning",
    "JointTechnique",
    "LossyRemovalError",
    "ModelConventions",
    "Objection",
    "OpenedTarget",
    "OrderError",
    "Phase",
    "Plan",
    "PlanError",
    "PlanStep",
    "PluginError",
    "Resource",
    "RunEntry",
    "RunReport",
    "Skipped",
    "Status",
    "Target",
    "Technique",
    "TensorSlot",
    "UnsupportedModelError",
    "apply",
    "attention_functions",
    "bare_entry",
    "format_bytes",
    "hookimpl",
    "load",
    "parse_bytes",
    "parse_device",
    "parse_dtype",
    "parse_kwarg_names",
    "parse_module_names",
    "parse_onload_device",
    "plan",
    "refuse_meanwhile",
    "remove",
    "skeleton_of",
    "status",
]
