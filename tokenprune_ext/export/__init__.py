"""Models as programs for other run times: torch.export, AOTInductor packages, ONNX."""
