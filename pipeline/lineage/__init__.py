"""From a sample to the checkpoints trained on it, and back to the URLs that taught a checkpoint.

In: a corpus's manifest, and a uid, a URL or a checkpoint. Out: what `capfilt trace` prints, as plain data.

`sample_trace` follows one sample through the stages, `checkpoint_trace` one checkpoint to its corpora, and
`trained_on` finds the checkpoints that a sample went into, and `taught_by` those that its captions come from.
"""
