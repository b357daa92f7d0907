"""The networks of the tasks. Module names matter: the globs of `configs/task/*.yaml` refer to them."""
