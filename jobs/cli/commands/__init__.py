"""The commands of `capfilt`, a module for each group of them: arguments read, the work called, its answer printed.

In: what typer has read. Out: the answer as tables or JSON. No module holds work of its own.
"""
