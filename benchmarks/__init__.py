"""Scripts that print ratio tables: `python -m benchmarks.attention`, `.guidance`, `.propagation`, `.memory`."""
