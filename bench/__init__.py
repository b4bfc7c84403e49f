"""Benchmarks: kernels, full steps, memory and rounding drift. Run from the repository root; see bench/README.md."""
