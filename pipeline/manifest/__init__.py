"""The corpus in SQL: records as tables, the questions asked of them, and verification.

In: records and committed Parquet files. Out: rows, Parquet parts, `manifest.duckdb`. Reads the whole corpus;
writes below `manifest/` and the catalog only.

`record_rows` turns records into rows, `compaction` keeps them in few files, `manifest` answers questions over
both and `sandbox` those of a user; `catalog_file` writes `manifest.duckdb`. `status` and `card` are the package's
own questions; the package `verify` compares every file with its record.
"""
