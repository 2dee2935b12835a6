"""What commands print: tables, values, JSON, errors, and the progress of a run.

In: rows, numbers and the counts of a run. Out: text that fits the terminal, without control characters of others.
"""
