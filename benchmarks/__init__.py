"""Benchmarks of tunelet beside its peers: `python -m benchmarks --help`. Nothing in the package imports this."""
