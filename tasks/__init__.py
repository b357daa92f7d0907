"""The paper's experiments: one file each, reading like its section of Appendix B, on models, data and metrics below."""
