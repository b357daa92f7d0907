"""The Hydra configs, installed as `qprune.configs`: `run.yaml` and a folder per group of choices."""
