"""One-line error messages for failed Hub requests, with a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError

from trex_models.cli import first_line

LOG_IN = (
    "run `hf auth login` or set HF_TOKEN, with a token that has write access "
    "(https://huggingface.co/settings/tokens)"
)


class HubError(RuntimeError):
    """A request to the Hub failed; the message says what to do."""


@contextmanager
def explain_errors(repository: str) -> Iterator[None]:
    """Convert errors of the Hub's client to ``HubError`` with the name of the repository."""
    try:
        with _unwrapped():
            yield
    except HfHubHTTPError as error:
        raise HubError(f"{repository}: {_explain(error, repository)}") from error
    except HTTPError as error:
        raise HubError(
            f"{repository}: the Hub is not reachable ({first_line(error)}); check the network and "
            "HF_ENDPOINT, then run the command again"
        ) from error
    except OSError as error:
        if error.errno is not None:  # a file system error, not the Hub's
            raise
        raise HubError(f"{repository}: {first_line(error)}; run the command again") from error


@contextmanager
def _unwrapped() -> Iterator[None]:
    """Raise the cause of a failed upload, which the client hides in a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__cause__, HTTPError | OSError):
            raise error.__cause__ from error
        raise


def _explain(error: HfHubHTTPError, repository: str) -> str:
    status = error.response.status_code
    reason = (error.server_message or "no reason given").partition("\n")[0]
    answer = f"the Hub answered {status} ({reason})"
    namespace = repository.partition("/")[0]
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return f"{answer}: the token is invalid; {LOG_IN}"
    if status in (401, 404):
        return f"{answer}: the repository or file does not exist, or the token has no read access"
    if status == 403:
        return (
            f"{answer}: the token has no write access; ask an owner of {namespace} for it or "
            "choose another --namespace"
        )
    if status in (409, 412):
        return f"{answer}: the repository was changed in the meantime; run the command again"
    if status == 429:
        return f"{answer}: too many requests; wait some minutes, then run the command again"
    if status >= 500:
        return f"{answer}: server error; run the command again later, finished uploads are skipped"
    return f"{answer}: the request is invalid; TREX_TRACEBACK=1 shows its origin"
