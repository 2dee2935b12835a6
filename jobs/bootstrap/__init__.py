"""``capfilt bootstrap``: rounds of pretraining, fine-tuning and recaptioning (BLIP, section 3.3).

`rounds` turns one config into those of every step, and `run` does the steps that are missing. What is done is seen by
`progress` from the corpora, checkpoints and exports; there is no state beside them.
"""
