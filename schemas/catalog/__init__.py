"""The SQL of the manifest: the tables as views over committed files, and the views and macros on top of them.

The SQL keeps to what DuckDB 1.5 knows too (``CASE``, not the ``if()`` of 2.0), since people open the catalog in the
shell that they have.

Two layers. ``base`` has one relation for each kind of file; it is either Parquet found by name and kept only
where a record commits it (``corpus_files``: the catalog that anyone opens), or Arrow data that the caller
registers (the sandbox of ``capfilt sql``). Everything else is the same SQL on both.

`table_schemas` has the columns of the files, `tables` the tables over them, `views` what is asked beyond the tables,
`statements` all of it in the order in which it is made.
"""
