"""Models as programs for other run times: torch.export, AOTInductor packages, ONNX."""

from .graph import captured
from .onnx import OnnxSummary, export_onnx
from .program import LoadedProgram, export_package, export_program, load_program

__all__ = [
    "LoadedProgram",
    "OnnxSummary",
    "captured",
    "export_onnx",
    "export_package",
    "export_program",
    "load_program",
]
