"""The config: YAML composed by Hydra, checked against one schema, and named by a signature."""
