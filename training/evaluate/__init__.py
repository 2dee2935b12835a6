"""Zero-shot evaluation: retrieval, captioning, question answering, and the probe of a run."""
