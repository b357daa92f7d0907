"""The command line: verbs, composed configs, error messages and shell completion."""
