"""S3, GCS and Azure as their own tools find them: credentials, endpoint, region, retries and limits of time.

Settings come from the environment and, for S3, from the profiles of the AWS tools; nothing of them is in a config.
"""

import contextlib
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, MemoryStore, S3Store

from pipeline.storage.errors import ObjectStorageError, StorageAwayError

ObjectStore = S3Store | GCSStore | AzureStore | MemoryStore

# Schemes that name the same storage.
SCHEMES = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "abfss": "az"}
_NAMES = {"s3": "S3", "gs": "GCS", "az": "Azure"}
_CHECKS = {
    "s3": "check AWS_ENDPOINT_URL, AWS_REGION, AWS_PROFILE and the network",
    "gs": "check the bucket's name, GOOGLE_APPLICATION_CREDENTIALS and the network",
    "az": "check AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ENDPOINT and the network",
}
# A request may take as long as a shard of 1 GB on a slow line, but never stand still.
_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S, _TIMEOUT = 10.0, 60.0, "15min"
_MAX_RETRIES, _RETRY_FOR = 15, timedelta(seconds=60)
# The client fetches credentials anew five minutes before they expire.
_CREDENTIALS_LAST = timedelta(minutes=10)


_URL = re.compile(r"https?://[^\s/]")
_MESSAGE = re.compile("<Message>(.*?)</Message>", re.DOTALL)
# Refusals that are over in a while: of too many requests, of a login that is being renewed, of a clock being set.
_PASSING = re.compile(
    "status code: (408|425|429)|<Code>(SlowDown|RequestTimeout|RequestTimeTooSkewed|ExpiredToken|TokenRefreshRequired|"
    "OperationAborted)<"
)
# "Error performing GET http://host/key?query in 2ms, after 3 retries, ... - Server returned non-2xx status code: 500"
_FAILED = re.compile(
    r"Error performing ([A-Z]+) ([^\s?]+)\S* in [^\n]*? - (?:Server returned non-2xx status code: |HTTP error: )?(.*)",
    re.DOTALL,
)


@lru_cache(maxsize=64)
def open_store(scheme: str, container: str) -> ObjectStore:
    """Return the client of one bucket or container; no request is made.

    Args:
        scheme: a key of ``SCHEMES``.
        container: the bucket; for Azure the container, or ``container@account.dfs.core.windows.net``.

    Raises ObjectStorageError where there are no credentials, or the settings cannot be used.
    """
    openers: dict[str, Callable[[str], ObjectStore]] = {"s3": _s3, "gs": _gcs, "az": _azure}
    kind = SCHEMES[scheme]
    try:
        return openers[kind](container)
    except ObjectStorageError:
        raise
    # OSError too: a file of certificates that is missing must not look like a missing object.
    except (BaseError, OSError, ValueError) as error:
        raise _unusable(kind, _reason(error)) from error


@contextlib.contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn the client's errors into FileNotFoundError and ObjectStorageError, each with the URL.

    A bucket that does not exist is an ObjectStorageError: it must not look like an absent file. What may succeed in a
    while is a StorageAwayError.
    """
    try:
        yield
    except FileNotFoundError as error:
        if "<Code>NoSuchBucket<" in str(error) or "ContainerNotFound" in str(error):
            raise refused(url, error) from error
        raise FileNotFoundError(2, "no such object", url) from error
    except BaseError as error:
        if "status code: 4" in str(error) and not _PASSING.search(str(error)):
            raise refused(url, error) from error
        if "object with invalid path" in str(error):
            raise ObjectStorageError(
                f"{url} cannot be listed: {_reason(error)}; rename or delete that object"
            ) from error
        raise StorageAwayError(_message(SCHEMES[url.partition("://")[0]], _reason(error))) from error
    except ValueError as error:
        raise ObjectStorageError(
            f"{url} cannot be the name of an object: {_reason(error)}; name one without empty parts, . and .."
        ) from error


def _unusable(kind: str, reason: str) -> ObjectStorageError:
    return ObjectStorageError(_message(kind, reason))


def _message(kind: str, reason: str) -> str:
    return f"{_NAMES[kind]} cannot be used: {reason}; {_CHECKS[kind]}"


def refused(url: str, error: Exception) -> ObjectStorageError:
    """Return the error of a request that the storage answered with a refusal."""
    kind = SCHEMES[url.partition("://")[0]]
    return ObjectStorageError(
        f"{_NAMES[kind]} refused {url}: {_reason(error)}; check that the bucket exists, and that these credentials "
        "may use it"
    )


def _reason(error: Exception) -> str:
    """Return the server's own message where its answer has one, else the request and what became of it."""
    text = str(error).partition("\n\nDebug source")[0]
    if message := _MESSAGE.search(text):
        return message[1].partition("\n")[0].rstrip(".")
    if failed := _FAILED.search(text):
        outcome = failed[3].partition("\n")[0].rstrip(": ")
        return f"{failed[1]} {failed[2]}: {outcome}"
    return text.partition("\n")[0]


def _retries() -> Any:
    attempts = os.environ.get("AWS_MAX_ATTEMPTS", "")
    return {
        "max_retries": int(attempts) - 1 if attempts.isdecimal() and attempts != "0" else _MAX_RETRIES,
        "retry_timeout": _RETRY_FOR,
    }


def _client(endpoint: str) -> Any:
    bundle = os.environ.get("AWS_CA_BUNDLE") or os.environ.get("REQUESTS_CA_BUNDLE")
    certificate = {"root_certificate": Path(bundle).read_bytes()} if bundle else {}
    read_timeout_s = float(os.environ.get("CAPFILT_STORAGE_TIMEOUT_S") or _READ_TIMEOUT_S)
    times = {
        "connect_timeout": f"{min(read_timeout_s, _CONNECT_TIMEOUT_S)}s",
        "read_timeout": f"{read_timeout_s}s",
        "timeout": _TIMEOUT,
    }
    return {**times, **certificate, "allow_http": endpoint.startswith("http://")}


# -- S3 ------------------------------------------------------------------------------------------------------


def _s3(bucket: str) -> S3Store:
    """As the AWS tools: environment, profile, web identity, container and instance role, in that order.

    Anonymous with AWS_SKIP_SIGNATURE=true, requester pays with AWS_REQUEST_PAYER=true: the client reads both.
    """
    from botocore.exceptions import BotoCoreError

    environment = os.environ
    try:
        profile = _AwsProfile()
        is_signed = environment.get("AWS_SKIP_SIGNATURE", "").lower() not in ("1", "true")
        options: dict[str, Any] = {"credential_provider": profile.credentials()} if is_signed else {}
    except BotoCoreError as error:
        raise _unusable("s3", _reason(error)) from error
    endpoint = (
        environment.get("AWS_ENDPOINT_URL_S3")
        or environment.get("AWS_ENDPOINT_URL")
        or profile.endpoint
        or ""
    )
    options["region"] = (
        environment.get("AWS_REGION")
        or environment.get("AWS_DEFAULT_REGION")
        or profile.region
        or "us-east-1"
    )
    if endpoint:
        if not _URL.match(endpoint):
            raise _unusable("s3", f"the endpoint {endpoint!r} is not a URL")
        options |= {"endpoint": endpoint, "aws_endpoint_url_s3": endpoint}
    return S3Store(bucket, client_options=_client(endpoint), retry_config=_retries(), **options)


class _AwsProfile:
    """What the AWS tools find in their files and elsewhere: keys, and what the environment leaves open besides."""

    def __init__(self) -> None:
        import botocore.session

        self._session = botocore.session.get_session()
        scoped = self._session.get_scoped_config()
        services = self._session.full_config.get("services", {}).get(scoped.get("services"), {})
        self.endpoint: str = services.get("s3", {}).get("endpoint_url") or scoped.get("endpoint_url") or ""
        self.region: str = self._session.get_config_variable("region") or ""

    def credentials(self) -> Callable[[], dict[str, Any]]:
        found = self._session.get_credentials()
        if found is None:
            raise ObjectStorageError(
                "S3 wants credentials and there are none; "
                "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )

        def fetch() -> dict[str, Any]:
            # Roles and logins renew what they hand out by themselves.
            frozen = found.get_frozen_credentials()
            return {
                "access_key_id": frozen.access_key,
                "secret_access_key": frozen.secret_key,
                "token": frozen.token,
                "expires_at": datetime.now(UTC) + _CREDENTIALS_LAST,
            }

        return fetch


# -- GCS -----------------------------------------------------------------------------------------------------

_GCS_KEYS = (
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_BEARER_TOKEN",
    "GOOGLE_SKIP_SIGNATURE",
)


def _gcs(bucket: str) -> GCSStore:
    """As Google's tools: a service account, `gcloud auth application-default login`, or the machine's own account."""
    emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
    options: dict[str, Any] = {}
    if emulator:
        emulator = emulator if "://" in emulator else f"http://{emulator}"
        # As the client's own documentation has it: a key that says where the emulator is, and that it wants no login.
        account = dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
        options["service_account_key"] = json.dumps(
            {**account, "gcs_base_url": emulator, "disable_oauth": True}
        )
    elif not any(os.environ.get(name) for name in _GCS_KEYS) and not _gcloud_login().exists():
        _require_metadata_server(
            os.environ.get("GCE_METADATA_HOST", "metadata.google.internal"),
            "GCS wants credentials and there are none; set GOOGLE_APPLICATION_CREDENTIALS, or log in with "
            "`gcloud auth application-default login`",
        )
    return GCSStore(bucket, client_options=_client(emulator), retry_config=_retries(), **options)


def _gcloud_login() -> Path:
    folder = os.environ.get("CLOUDSDK_CONFIG") or Path.home() / ".config" / "gcloud"
    return Path(folder) / "application_default_credentials.json"


# -- Azure ---------------------------------------------------------------------------------------------------

_AZURE_KEYS = (
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_TOKEN",
    "AZURE_CLIENT_SECRET",
    "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_FEDERATED_TOKEN_FILE",
    "AZURE_USE_AZURE_CLI",
    "AZURE_SKIP_SIGNATURE",
)


def _azure(container: str) -> AzureStore:
    """As Azure's tools: a connection string, an account with its key or a SAS token, a login, a managed identity."""
    environment = os.environ
    container, _, host = container.partition("@")
    fields = dict(
        part.split("=", 1)
        for part in environment.get("AZURE_STORAGE_CONNECTION_STRING", "").split(";")
        if "=" in part
    )
    options: dict[str, Any] = {
        "account_name": host.partition(".")[0]
        or fields.get("AccountName")
        or environment.get("AZURE_STORAGE_ACCOUNT_NAME")
        or environment.get("AZURE_STORAGE_ACCOUNT"),
        "account_key": fields.get("AccountKey") or environment.get("AZURE_STORAGE_KEY"),
        "sas_key": fields.get("SharedAccessSignature"),
        "endpoint": fields.get("BlobEndpoint"),
    }
    options = {name: value for name, value in options.items() if value}
    if "account_name" not in options:
        raise ObjectStorageError(
            "Azure wants the name of a storage account; set AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY, "
            "or AZURE_STORAGE_CONNECTION_STRING"
        )
    if not {"account_key", "sas_key"} & set(options) and not any(environment.get(key) for key in _AZURE_KEYS):
        _require_metadata_server(
            "169.254.169.254",
            "Azure wants credentials and there are none; set AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN or "
            "AZURE_STORAGE_CONNECTION_STRING, or log in with `az login` and set AZURE_USE_AZURE_CLI=true",
        )
    endpoint = options.get("endpoint", environment.get("AZURE_STORAGE_ENDPOINT", ""))
    return AzureStore(container, client_options=_client(endpoint), retry_config=_retries(), **options)


def _require_metadata_server(host: str, message: str) -> None:
    """Raise ObjectStorageError unless the cloud's own machines are this one: the client would ask for minutes."""
    try:
        socket.create_connection((host, 80), timeout=1).close()
    except OSError as error:
        raise ObjectStorageError(message) from error
