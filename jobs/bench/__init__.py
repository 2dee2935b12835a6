"""Benchmarks: what the pipeline costs on this machine. See docs/benchmarks.md."""
