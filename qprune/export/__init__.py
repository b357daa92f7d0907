"""A trained network as files that need no PyTorch: ONNX with integer weights, and a sparse form for storage."""
