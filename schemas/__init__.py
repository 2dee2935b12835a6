"""Declarations that every room shares: config tree, tables, records, statuses, catalog SQL, errors. No I/O."""
