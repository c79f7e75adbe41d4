"""Scripts that print tables: `python -m benchmarks.attention`, also align, cpu, decode, fewer_steps, full_size,
guidance, guidance_interval, layouts, memory, modules, propagation."""
