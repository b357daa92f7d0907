"""The Hydra configs, installed as `qprune.configs`: `run.yaml` and one package per group of choices."""
