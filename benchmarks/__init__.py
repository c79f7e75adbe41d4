"""Scripts that print tables: `python -m benchmarks.attention`; also align, cpu, fewer_steps, guidance, guidance_interval,
memory, modules, propagation, and others beside this file."""
