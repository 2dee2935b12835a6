"""`python -m jobs.cli`: the command line where no `capfilt` script is on the path, as in a submitted job."""

from jobs.cli.main import program

if __name__ == "__main__":
    program()
