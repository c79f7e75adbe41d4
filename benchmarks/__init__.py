"""Scripts that print tables: `python -m benchmarks.attention`, and so on; docs/benchmarks.md has them."""
