"""The Hub's errors as one line each, with the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError

from trex_models.cli import first_line

LOG_IN = (
    "`hf auth login`, or set HF_TOKEN, with a token that may write "
    "(https://huggingface.co/settings/tokens)"
)


class HubError(RuntimeError):
    """The Hub did not do what was asked; the message says what to do."""


@contextmanager
def explain_errors(repository: str) -> Iterator[None]:
    """Raise the client's errors as ``HubError``, about a repository."""
    try:
        with _unwrapped():
            yield
    except HfHubHTTPError as error:
        raise HubError(f"{repository}: {_explain(error, repository)}") from error
    except HTTPError as error:
        raise HubError(
            f"{repository}: the Hub cannot be reached ({first_line(error)}); check the network and "
            "HF_ENDPOINT, then run the same command again"
        ) from error
    except OSError as error:
        if error.errno is not None:  # of the disk
            raise
        raise HubError(f"{repository}: {first_line(error)}; run the same command again") from error


@contextmanager
def _unwrapped() -> Iterator[None]:
    """Raise the cause of a failed upload of a large file, which the client hides in another."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__cause__, HTTPError | OSError):
            raise error.__cause__ from error
        raise


def _explain(error: HfHubHTTPError, repository: str) -> str:
    status = error.response.status_code
    said = (error.server_message or "no reason given").partition("\n")[0]
    answer = f"the Hub answered {status} ({said})"
    namespace = repository.partition("/")[0]
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return f"{answer}: it refuses the token; {LOG_IN}"
    if status in (401, 404):
        return f"{answer}: there is no such repository or file, or the token may not see it"
    if status == 403:
        return (
            f"{answer}: the token may not write there; ask an owner of {namespace} for write "
            "access, or choose another --namespace"
        )
    if status in (409, 412):
        return f"{answer}: somebody else has just changed it; run the same command again"
    if status == 429:
        return f"{answer}: too many requests; wait some minutes, then run the same command again"
    if status >= 500:
        return (
            f"{answer}: it has a fault of its own; run the same command again later, it continues"
        )
    return f"{answer}: correct the request; TREX_TRACEBACK=1 shows where it was made"
