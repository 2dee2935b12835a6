"""``capfilt init``: a config for what somebody has, written from what is found there and on this machine."""
