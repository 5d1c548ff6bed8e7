# SPDX-License-Identifier: Apache-2.0
"""URLs for TensorStore: endpoints, credentials, bounded retries, and what its errors call for."""

import os
import pathlib
from typing import Any

import tensorstore as ts

# Each request is sent up to six times: 31 s of waiting in between, and a jitter of up to 5 s.
RETRIES = {"max_retries": 5, "initial_delay": "1s", "max_delay": "16s"}
# TensorStore knows no timeouts but these variables: seconds until connected, and without a byte.
TIMEOUTS = {
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": "10",
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "15",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
}
_AWS_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_PROFILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_EC2_METADATA_SERVICE_ENDPOINT",
)
_AWS_FILES = {"AWS_SHARED_CREDENTIALS_FILE": "credentials", "AWS_CONFIG_FILE": "config"}
_EC2_VENDOR = pathlib.Path("/sys/devices/virtual/dmi/id/sys_vendor")

_DENIED = (
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "ExpiredToken",
    "invalid_grant",
    "credentials file",
)
_UNREACHED = ("retry attempts failed", "CURL error")
_NO_BUCKET = ("NOT_FOUND", "Failed to resolve aws_region")
_LOGIN = {
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to "
    "the file of a service account that may read the bucket",
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, to an account that may "
    "read the bucket",
}
_NO_LOGIN = (
    "this server wants a login, which is not supported: copy the checkpoint to a local folder"
)
_ENDPOINT = {
    "gs": "TENSORSTORE_GCS_HTTP_URL, if set",
    "s3": "AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, if set",
}


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a URL, and no local path."""
    return "://" in os.fspath(path)


def store_spec(url: str) -> dict[str, Any]:
    """TensorStore's specification of the key-value store at `url`, which must end in a slash.

    Private S3 services are named by the variables that AWS's own tools read. Retries are bounded,
    so that a dead host ends in an error after two minutes; variables that are set already stay.

    Raises:
      ValueError: the URL is of a kind that TensorStore does not know.
    """
    spec = ts.KvStore.Spec(url).to_json()
    driver = spec["driver"]
    if driver not in ("gcs", "s3", "http"):
        return spec
    for name, value in TIMEOUTS.items():
        os.environ.setdefault(name, value)
    spec[f"{driver}_request_retries"] = RETRIES
    if driver == "s3":
        spec["aws_credentials"] = {"type": "default" if _has_aws_credentials() else "anonymous"}
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            spec["endpoint"] = endpoint.rstrip("/")
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
            spec["aws_region"] = region or "us-east-1"  # without endpoint, the bucket tells its own
    return spec


def _has_aws_credentials() -> bool:
    """Whether credentials may be found: the search costs seconds, and many lines of warnings."""
    if any(os.environ.get(name) for name in _AWS_VARIABLES):
        return True
    for variable, name in _AWS_FILES.items():
        if os.path.exists(os.environ.get(variable) or os.path.expanduser(f"~/.aws/{name}")):
            return True
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    try:
        return _EC2_VENDOR.read_text().startswith("Amazon EC2")
    except OSError:
        return False


def is_denied(error: Exception) -> bool:
    """Whether a storage service refused what was asked, or found no use for the credentials."""
    return any(sign in str(error) for sign in _DENIED)


def remedy(url: str, error: Exception) -> str | None:
    """What to do about an error that the network or a storage service caused; None: about others.

    TensorStore's errors have no class or code, so their text has to tell.
    """
    scheme = url.partition("://")[0]
    if not is_url(url) or scheme == "file":
        return None
    if is_denied(error):
        login = _LOGIN.get(scheme, _NO_LOGIN)
        return f"Access was denied, or nothing is at that path: check it, and {login}."
    text = str(error)
    if any(sign in text for sign in _UNREACHED):
        hosts = f" ({_ENDPOINT[scheme]})" if scheme in _ENDPOINT else ""
        return f"The server did not answer as it should: check network and host{hosts}, try again."
    if any(sign in text for sign in _NO_BUCKET):
        return "There is no such bucket: check its name and region."
    return None
