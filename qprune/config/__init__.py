"""The config: composed by Hydra, checked by a schema, named by a signature."""
