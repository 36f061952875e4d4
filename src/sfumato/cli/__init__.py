"""The command line: one module a command, and nothing that takes time to import."""
