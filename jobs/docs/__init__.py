"""The generated pages of docs/: what code declares is described from the code."""
