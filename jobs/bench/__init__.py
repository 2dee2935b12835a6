"""Benchmarks: what each part of the pipeline costs on this machine, compared with the library it is built on.

In: sizes and rounds from the command line; the data is made by `fixtures/`. Out: a dictionary of medians, ratios and
peak memory, which `commands` prints as a table or JSON. A module a benchmark: those of models and pixels in
`engines/`, of a training in `training/`, of what grows with a corpus in `corpora/`; docs/benchmarks.md has the results.
"""
