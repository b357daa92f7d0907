"""The paper's experiments: one file each, like the sections of Appendix B, with models, data and metrics below."""
