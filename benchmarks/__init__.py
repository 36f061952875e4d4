"""Speed and memory against the reference library, on the machine at hand: `python -m benchmarks --help`."""
