"""Scripts that print tables: `python -m benchmarks.attention`, also align, cpu, decode, guidance, memory, modules and
propagation."""
