"""Scripts that print tables, each `python -m benchmarks.NAME`: align, attention, cpu, decode, fewer_steps, full_size,
guidance, guidance_interval, layouts, memory, modules, plan, propagation."""
