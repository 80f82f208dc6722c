"""Models as programs for other run times: torch.export, AOTInductor packages, ONNX."""

from .program import LoadedProgram, export_package, export_program, load_program

__all__ = ["LoadedProgram", "export_package", "export_program", "load_program"]
