"""Callbacks that drive a compressor in the training loops of other libraries; each needs its extra of this package."""
