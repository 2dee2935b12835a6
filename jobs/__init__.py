"""Everything that knows Ray, the terminal, or money: the command line, the runs, the demo."""
