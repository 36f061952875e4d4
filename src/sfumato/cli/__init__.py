"""The command line: one module per command, with no slow imports."""
