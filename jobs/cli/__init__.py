"""The command `capfilt`: one small function a command; libraries are imported inside them."""
