"""The files of a model that comes from outside: found on this machine, on the hub or on object storage, read as data.

In: the name that a config gives. Out: a local folder, and of its files what a library may be told.
"""
