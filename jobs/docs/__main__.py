"""`python -m jobs.docs`, which `make docs` calls: write every generated page."""

from jobs.docs.pages import main

if __name__ == "__main__":
    main()
