"""The modules in which families register: a table of names. A file that names a family finds its module here."""

from __future__ import annotations

from typing import Any

CHANGES: dict[str, str] = {
    "depth": "microglia.graph.depth",
    "experts": "microglia.graph.experts.removal",
    "masks": "microglia.storage.masked",
    "shrunk": "microglia.graph.cutting.change",
    "gates": "microglia.dynamic.change",
    "permuted": "microglia.graph.order.permute",
    "selected": "microglia.graph.selection",
    "activations": "microglia.dynamic.activation_layers",
}
"""Field of ``plan.json`` -> module that registers this change, in the order in which changes are replayed.

Changes that give modules another form come before all others (see `microglia.storage.changes.Change.forms`).
A file names a field, never a module. A field outside this table is known only after its module was imported.
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
SCOPE_FILES: dict[str, str] = {"sensitivity": "microglia.storage.sensitivity"}
"""Word before the colon of a scope such as ``sensitivity:FILE`` -> module that registers what reads the file."""
