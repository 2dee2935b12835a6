"""Benchmarks of lists, records, manifests, pages and storage: how they go with the size of a corpus."""
