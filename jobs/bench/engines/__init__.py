"""Benchmarks of the engines: decoding images, captions, ranking, filtering and fp8, each against the usual library.

In: a model of full-size config with small or random weights. Out: medians and ratios of rounds taken in turn.
"""
