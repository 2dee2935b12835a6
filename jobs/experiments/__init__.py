"""Which way to curate and to train is best, measured where truth is known: on the demo world.

In: the name of an experiment. Out: a folder with corpora of the world, what each arm keeps of them, a model trained on
each for each seed, and a page of what came out. `capfilt experiment NAME` runs and continues one.

`questions/` has a file for each experiment: its arms, and what the papers say. `arms` says what an arm keeps, `facts`
what is said of that without training; `judges` says what a trained model is asked, `trials/` how it is trained.
`corpora` and `run` do what is missing; `results` compares, `report` writes the table, the plot and the page.
"""
