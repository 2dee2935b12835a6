"""What commands print: tables, values, JSON, errors, and the progress of a run."""
