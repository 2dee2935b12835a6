"""``capfilt init``: a config for what somebody has, written from what is found there and on this machine.

In: paths, globs or URLs. Out: a TOML file with comments, checked as `capfilt plan` checks it, and the next commands.
"""
