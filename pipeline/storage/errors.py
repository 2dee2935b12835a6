"""Errors of local disk, S3 and GCS as one line for the user: what failed, and what to do about it."""

import errno
import sys

from pipeline.regular_files import NotRegularFileError
from schemas.errors import first_line

# What to do about the common errors of a file system.
_ERRNO_HINTS = {
    errno.ENOSPC: "make room",
    errno.EFBIG: "make room, or raise the limit of a file's size",
    errno.EDQUOT: "make room, or ask for a larger quota",
    errno.EROFS: "name a folder that may be written",
    errno.EACCES: "give this user the right to, or name another place",
    errno.EPERM: "give this user the right to, or name another place",
    errno.ENOTDIR: "a file stands where a folder is expected; name a folder",
    errno.EISDIR: "a folder stands where a file is expected; name a file",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.ELOOP: "a link leads back to itself; name a folder",
}


def storage_error_message(error: BaseException) -> str | None:
    """Return why storage cannot be used and what to do; None where the error has another cause.

    S3 and GCS libraries raise their own errors, not OSError, where credentials or the network are missing.
    """
    if _is(error, "botocore.exceptions", "NoCredentialsError"):
        return (
            "S3 wants credentials and there are none; "
            "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if _is(error, "botocore.exceptions", "BotoCoreError"):
        hint = "check AWS_ENDPOINT_URL, AWS_REGION, AWS_PROFILE and the network"
        return f"S3 cannot be used: {first_line(error)}; {hint}"
    if _is(error, "google.auth.exceptions", "GoogleAuthError"):
        return (
            f"GCS wants credentials: {first_line(error)} Set GOOGLE_APPLICATION_CREDENTIALS, or log in with "
            "`gcloud auth application-default login`"
        )
    if not isinstance(error, OSError):
        return None
    if isinstance(error, NotRegularFileError):
        return f"{error.filename} cannot be read: {error.strerror}; remove it, or put the file itself there"
    cause = error.__cause__
    if _is(cause, "botocore.exceptions", "ClientError"):
        call = getattr(cause, "operation_name", "a request")
        hint = "check that the bucket exists, and that these credentials may use it"
        return f"S3 refused {call}: {first_line(error)}; {hint}"
    if error.errno in _ERRNO_HINTS:
        place = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{place}; {_ERRNO_HINTS[error.errno]}"
    return None


def _is(error: BaseException | None, module: str, name: str) -> bool:
    """Tell whether an error is of a library's class, without importing the library."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(error, getattr(loaded, name))
