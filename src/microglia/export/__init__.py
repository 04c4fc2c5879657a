"""Export: a pruned model as a file that another engine runs, verified before it counts as written."""

from microglia.export.exported import Exported
from microglia.export.int8 import Int8, Int8Report
from microglia.export.onnx import open_onnx, to_onnx
from microglia.export.openvino import open_openvino, to_openvino
from microglia.export.targets import Target, targets
from microglia.export.write import Export, export

__all__ = [
    "Export",
    "Exported",
    "Int8",
    "Int8Report",
    "Target",
    "export",
    "open_onnx",
    "open_openvino",
    "targets",
    "to_onnx",
    "to_openvino",
]
