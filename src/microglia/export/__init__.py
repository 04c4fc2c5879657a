"""Export: a pruned model as a file that another engine runs, verified before it counts as written."""

from microglia.export.exported import Exported
from microglia.export.onnx import open_onnx, to_onnx
from microglia.export.openvino import open_openvino, to_openvino

__all__ = ["Exported", "open_onnx", "open_openvino", "to_onnx", "to_openvino"]
