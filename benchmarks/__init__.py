"""Scripts that print tables: `python -m benchmarks.attention`, also align, guidance, memory, modules, propagation."""
