"""One step of a training: the sum of the gradients over the ranks, the optimizer, and its memory and seconds.

In: parameters and their gradients. Out: updated parameters, and figures of the step.
"""
