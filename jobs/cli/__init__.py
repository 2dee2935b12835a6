"""The command `capfilt`: one small function a command; libraries are imported inside them.

In: the command line. Out: text or JSON on standard output, progress and errors on standard error, an exit code.
`main` joins the modules of `commands/`; `options` and `groups` hold what these share, `summary` what a run prints last.
"""
