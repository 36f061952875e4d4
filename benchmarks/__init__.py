"""Speed and memory use on this machine, compared with the reference library: `python -m benchmarks --help`."""
