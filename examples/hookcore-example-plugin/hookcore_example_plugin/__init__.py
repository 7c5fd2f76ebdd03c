"""A complete hookcore plugin: statistics of what layers put out, without keeping it.

```python
import hookcore
from hookcore_example_plugin import ActivationStatistics, statistics

applied = hookcore.apply(model, [ActivationStatistics()])
model(x)
print(statistics(model))
applied.remove()
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hookcore import hookimpl
from hookcore_example_plugin.activations import ActivationStatistics, Statistics, StatisticsTable, statistics

if TYPE_CHECKING:
    from hookcore import Technique

__all__ = ["ActivationStatistics", "Statistics", "StatisticsTable", "statistics"]


@hookimpl
def hookcore_register_techniques() -> list[type[Technique]]:
    """Brings `ActivationStatistics`."""
    return [ActivationStatistics]
