"""Which way to curate is best, measured where truth is known: on the demo world.

In: the name of an experiment. Out: a folder with a corpus of the world, what each arm keeps of it, a model trained on
each for each seed, and a page of what came out. `capfilt experiment NAME` runs and continues one.

`arms` says what each arm keeps, `questions` which arms answer what, `trial` trains and judges one of them, `run` does
all that are missing, `report` writes the table, the plot and the page. Only `trial` and `run` touch a disk.
"""
