"""Declarations that all other packages share: config trees, tables, records, statuses, the catalog's SQL, errors.

No I/O; imports the standard library, pydantic and pyarrow only.
"""
