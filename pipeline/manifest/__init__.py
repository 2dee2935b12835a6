"""The corpus in SQL: records as tables, the questions asked of them, and verification.

In: records. Out: Parquet parts, `manifest.duckdb`, rows. Reads the corpus; writes below `manifest/` only.
"""
