"""Errors of local disk and of object storage as one line for the user: what failed, and what to do about it."""

import errno

from pipeline.regular_files import NotRegularFileError

# What to do about the common errors of a file system.
_ERRNO_HINTS = {
    errno.ENOSPC: "make room",
    errno.EFBIG: "make room, or raise the limit of a file's size",
    errno.EDQUOT: "make room, or ask for a larger quota",
    errno.EIO: "the disk fails, or the server behind it; the system's log says more",
    errno.EROFS: "name a folder that may be written",
    errno.EACCES: "give this user the right to, or name another place",
    errno.EPERM: "give this user the right to, or name another place",
    errno.ENOTDIR: "a file stands where a folder is expected; name a folder",
    errno.EISDIR: "a folder stands where a file is expected; name a file",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.ELOOP: "a link leads back to itself; name a folder",
}


class ObjectStorageError(OSError):
    """Object storage refused a request or did not answer; the message is one line and says what to do.

    A missing object is a FileNotFoundError instead.
    """


class StorageAwayError(ObjectStorageError):
    """Object storage did not answer, or asked to come again later; the same request may succeed in a while."""


def storage_error_message(error: BaseException) -> str | None:
    """Return why storage cannot be used and what to do; None where the error has another cause."""
    if isinstance(error, ObjectStorageError):
        return str(error)
    if isinstance(error, NotRegularFileError):
        return f"{error.filename} cannot be read: {error.strerror}; remove it, or put the file itself there"
    if isinstance(error, OSError) and error.errno in _ERRNO_HINTS:
        # Of a copy the second name is the file that is written; the first could be read.
        place = error.filename2 or error.filename
        return f"{error.strerror}{f': {place}' if place else ''}; {_ERRNO_HINTS[error.errno]}"
    return None
