"""Zero-shot evaluation: retrieval, captioning, question answering, and the validation of a run.

In: a trained model, a benchmark's annotations and images. Out: metrics with every setting that they depend on.
"""
