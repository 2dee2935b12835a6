"""Benchmarks of a training's steps, its data and its precision."""
