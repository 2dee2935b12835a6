"""Whole files on local disk, S3, GCS and Azure: put, created once, listed, read.

In: a path or a URL. Out: bytes, listings with sizes, and one plain line where the storage refuses.

`storage` is the one way to the corpus's files; `local_files`, `objects/` and `other_files` are the kinds of place that
it has. `filesystem` is for libraries that want fsspec's interface. `errors` explains why a file system failed,
`scratch` holds on local disk what is not finished.
"""
