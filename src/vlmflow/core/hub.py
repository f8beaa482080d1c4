"""Whether the hub has a model or data set: said that it is asked, asked once, and given up within seconds."""

from __future__ import annotations

from functools import cache
from logging import getLogger
from typing import Literal

ANSWER_WITHIN = 8.0  # seconds that the hub has


class HubError(ValueError):
    """The hub says that there is no such thing, or none for this user; the message says how."""


class UnreachableError(HubError):
    """The hub does not answer."""


@cache  # what was there once a process is
def ask(kind: Literal["model", "dataset"], name: str, revision: str | None = None) -> None:
    """Ask the hub whether it has a model or data set, in a revision.

    The hub's own clients ask one that does not answer for minutes, file by file.

    Raises:
        HubError: no such thing, or the hub does not answer (``UnreachableError``).
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    getLogger(__name__).warning("vlmflow: asking %s for %s", constants.ENDPOINT, name)
    try:
        api = HfApi(endpoint=constants.ENDPOINT)
        api.repo_info(name, repo_type=kind, revision=revision, timeout=ANSWER_WITHIN)
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise HubError(
            f"{constants.ENDPOINT} says HTTP {status}; check the name and revision, or log in with `hf auth login`"
        ) from error
    except Exception as error:  # of whichever library carries the request
        raise UnreachableError(f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})") from error
