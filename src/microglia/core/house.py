"""Where each family of the house registers: a table of names, so that a file which names one finds its module."""

from __future__ import annotations

from typing import Any

CHANGES: dict[str, str] = {
    "masks": "microglia.storage.masked",
    "shrunk": "microglia.graph.cutting.plan",
    "gates": "microglia.dynamic.gates",
    "permuted": "microglia.graph.order.permute",
}
"""Field of ``plan.json`` -> module that registers this change, in the order in which changes are replayed.

A file names a field, never a module: what is not in this table is only known if somebody imported and registered it.
"""

ALWAYS: dict[str, Any] = {"masks": {}, "shrunk": None, "gates": None}
"""Fields that every ``plan.json`` has had since version 1, and their values where nothing was done."""

EXECUTIONS: dict[str, str] = {
    **dict.fromkeys(("eager", "eager-channels-last", "packed", "compiled"), "microglia.runtime.dense.execution"),
    "onnxruntime": "microglia.export.engines",
    "openvino": "microglia.export.engines",
    "openvino-int8": "microglia.export.engines",
}
"""Name of a way to run a dense model -> module that registers it, in the order in which they are shown."""
