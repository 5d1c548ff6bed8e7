# SPDX-License-Identifier: Apache-2.0
"""Files of text and vocabularies, on disk or at addresses that `etils.epath` reads."""

import os

from etils import epath


def path(name: str | os.PathLike[str]) -> epath.Path:
    """The path that a name stands for, whether anything is there or not.

    Raises:
        ValueError: an address of a kind that is not read, or whose client is not installed.
    """
    try:
        found = epath.Path(name)
        found.exists()  # a client is only looked for when it is needed
    except (KeyError, ImportError) as error:
        raise ValueError(
            f"{os.fspath(name)} cannot be read ({type(error).__name__}: {error}): copy it to a "
            "local file; gs:// needs gcsfs or tensorflow, s3:// needs s3fs."
        ) from error
    return found
