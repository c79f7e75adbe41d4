"""Scripts that print tables: `python -m benchmarks.attention`, also align, cpu, guidance, memory, modules, propagation."""
