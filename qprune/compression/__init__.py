"""Quantization and pruning of weights and features: tensors and modules that own numbers but never time."""
