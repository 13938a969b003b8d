"""What huggingface_hub is asked for, held to limits, and its errors in plain words.

A server may state anything and need not end: the ETag, the commit and the size are looked at
before the client makes paths of them, what arrives is counted, and nothing waits for as long
as an answer says.
"""

from __future__ import annotations

import errno
import inspect
import json
import os
import re
import shlex
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ContentvecError, HubError
from .files import is_file, is_folder, is_there, read_regular

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

#: bytes of a file that describes weights: a report, a page, a plot
PAPER_BYTES = 1 << 26
#: four times those of the largest HuBERT, a billion parameters in float32
_WEIGHTS_BYTES = 1 << 34
_WEIGHTS_SUFFIXES = (".safetensors", ".pt", ".bin", ".npz")
#: what the Hub names blobs and commits by
_ETAG = re.compile(r"[0-9a-fA-F]{32,64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TOKEN = re.compile(r"hf_\w+")
#: top-level modules whose exceptions mean that the network did not deliver
_NETWORK = {"httpx", "httpx2", "httpcore", "requests", "urllib3", "ssl", "socket"}
#: the client, which reads the headers of answers itself
_CLIENT = {"huggingface_hub", *_NETWORK}
#: the system's words for that, where Python has no exception of its own for them
_LOST = {
    *(errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.EHOSTUNREACH),
    getattr(errno, "EHOSTDOWN", errno.EHOSTUNREACH),  # Windows has no such number
}
#: why a file cannot be written, also where the system does not say which
_NO_WRITING = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS),
    *(errno.ENOTDIR, errno.EEXIST),
}
#: seconds that a server may have the client wait before it asks again
_PATIENCE = 900
#: bytes that so many seconds of an answer bring at least; less would take days for weights
_LEAST, _LULL = 1 << 16, 60.0
#: times that a download may begin anew; the client does so for as long as anything arrives
MOST_TURNS = 5
#: what is raised where an answer is parsed -> what the answer was
_MALFORMED: dict[type[Exception], str] = {
    json.JSONDecodeError: "text that is not JSON",
    UnicodeDecodeError: "bytes that are no text",
    RecursionError: "lists in lists without end",
}


# what a server states ---------------------------------------------------------


def most_bytes(name: str) -> int:
    """What a file of this name in a repository may have."""
    return _WEIGHTS_BYTES if name.endswith(_WEIGHTS_SUFFIXES) else PAPER_BYTES


def require_plausible_file(repo_id: str, name: str, revision: str | None = None) -> bool:
    """Look at what the Hub states of a file, before any of it is used.

    returns: whether the Hub was asked. It is not offline, nor for a file of a commit that is
    in the cache.

    The client makes paths in its cache of the ETag and the commit. Raises HubError for
    what would lead out of it, and for a size that no such file has; otherwise what
    huggingface_hub raises.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    cached = revision is not None and _COMMIT.fullmatch(revision) is not None
    if constants.HF_HUB_OFFLINE or (
        cached and isinstance(try_to_load_from_cache(repo_id, name, revision=revision), str)
    ):
        return False
    stated = get_hf_file_metadata(hf_hub_url(repo_id, name, revision=revision))
    require_plausible_metadata(repo_id, name, stated, most_bytes(name))
    return True


def require_plausible_metadata(repo_id: str, name: str, stated: HfFileMetadata, most: int) -> None:
    """Raise HubError if the ETag, the commit or the size that is stated of a file is none.

    most: bytes that such a file may have
    """
    for what, value, form in (
        ("ETag", stated.etag, _ETAG),
        ("commit", stated.commit_hash, _COMMIT),
    ):
        if value is None or not form.fullmatch(value):
            raise not_the_hub(
                f"{repo_id} cannot be downloaded",
                found=f"the {what} {value!r} of {name}",
                expected="hexadecimal digits",
            )
    if stated.size is None or stated.size < 0:
        size = "no size" if stated.size is None else f"the size {stated.size:,}"
        raise not_the_hub(
            f"{repo_id} cannot be downloaded",
            found=f"{size} of {name}",
            expected="a number of bytes",
        )
    if stated.size > most:
        raise HubError(
            f"{repo_id} cannot be downloaded: {name} is too large for what it should be",
            found=f"{stated.size:,} bytes",
            expected=f"at most {most:,}",
        )


def not_the_hub(problem: str, *, found: str, expected: str) -> HubError:
    """The error for an answer that the Hub does not give."""
    from huggingface_hub import constants

    return HubError(
        f"{problem}: what answers is not the Hub",
        found=found,
        expected=expected,
        hint=f"check HF_ENDPOINT, now {constants.ENDPOINT}",
    )


def download(repo_id: str, name: str, revision: str | None = None, *, cached: bool = False) -> Path:
    """A file in the Hub's cache, downloaded if need be, and no further than it may be long.

    cached: only look there. Raises what huggingface_hub raises, HubError for a file
    without end.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    most = most_bytes(name)

    class Bounded(tqdm):
        """The client's bar; it is told of every piece that arrives."""

        arrived = 0
        turns = 0

        def update(self, n: float | None = 1) -> bool | None:
            if n is not None and n < 0:  # it takes back what had arrived
                self.turns += 1
                require_few_turns(self.turns, repo_id, name)
            self.arrived += int(n or 0)
            if self.arrived > most:
                raise endless(repo_id, name, most)
            return super().update(n)  # type: ignore[no-any-return]

    bounds: dict[str, Any] = {}
    if "tqdm_class" in inspect.signature(hf_hub_download).parameters:
        bounds["tqdm_class"] = Bounded  # clients before 1.0 cannot be told
    return Path(
        hf_hub_download(repo_id, name, revision=revision, local_files_only=cached, **bounds)
    )


def require_few_turns(turns: int, repo_id: str, name: str) -> None:
    """Raise HubError if a download has begun anew so often that it will never end."""
    if turns > MOST_TURNS:
        raise HubError(
            f"cannot download {name} from {repo_id}: the connection always breaks off",
            found=f"{turns} turns, each from the beginning of the file",
            expected="a server that goes on where it broke off",
            hint="run the same again later, or from another network",
        )


def endless(repo_id: str, name: str, most: int) -> HubError:
    """The error for a download that goes on past its end."""
    return HubError(
        f"cannot download {name} from {repo_id}: it does not end",
        found=f"more than {most:,} bytes",
        hint="what answers is not the Hub, or something between changes what it passes on",
    )


# the client's errors, in plain words ------------------------------------------


@contextmanager
def plain_words(repo_id: str, doing: str, most: int | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises while ``doing`` something into a HubError.

    most: bytes that an answer may have, where the client takes it whole into memory
    """
    try:
        _require_no_pipes(repo_id, doing)
        with _watched(repo_id, doing, most):
            yield
    except ContentvecError:
        raise
    except Exception as error:
        explained = explain(error, repo_id, doing)
        if explained is None:
            raise
        raise explained from error


@contextmanager
def _watched(repo_id: str, doing: str, most: int | None) -> Iterator[None]:
    """Look at answers before the client does, which waits for as long as a server says.

    Clients before 1.0 cannot be told. The hook stays in the client's session, which is the
    process's, and looks at nothing that this thread has not asked for here.
    """
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    session: Any = get_session()
    hooks = getattr(session, "event_hooks", None)
    if hooks is not None and _look not in hooks["response"]:
        session.event_hooks = {**hooks, "response": [*hooks["response"], _look]}
    before = _watch.set(_Watch(repo_id, doing, most))
    try:
        yield
    finally:
        _watch.reset(before)


@dataclass(frozen=True)
class _Watch:
    """What answers are held to; the fields are the arguments of ``plain_words``."""

    repo_id: str
    doing: str
    most: int | None

    def require_patience(self, answer: Any) -> None:
        """Raise HubError where the client would wait for too long before it asks again."""
        wait = _seconds_to_wait(answer.headers)
        if answer.status_code == 429 and wait > _PATIENCE:
            raise HubError(
                f"cannot {self.doing} {self.repo_id}: too many requests",
                found=f"HTTP 429, to be asked again after {wait:.15g} seconds",
                expected=f"at most {_PATIENCE} seconds",
                hint="run the same again after that time",
            )

    def in_time(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """``pieces`` as they arrive. Raises HubError if next to nothing does."""
        begun, arrived = time.monotonic(), 0
        for piece in pieces:
            arrived += len(piece)
            if (now := time.monotonic()) - begun > _LULL:
                if arrived < _LEAST:
                    raise HubError(
                        f"cannot {self.doing} {self.repo_id}: next to nothing arrives",
                        found=f"{arrived:,} bytes in {now - begun:.0f} seconds",
                        expected=f"{_LEAST:,} bytes or more",
                        hint="run the same again later, or from another network",
                    )
                begun, arrived = now, 0
            yield piece

    def bounded(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """``pieces`` of an answer that is taken whole into memory. Raises HubError for too many."""
        arrived = 0
        for piece in pieces:
            arrived += len(piece)
            if self.most is not None and arrived > self.most:
                raise endless(self.repo_id, "the description", self.most)
            yield piece


_watch: ContextVar[_Watch | None] = ContextVar("_watch", default=None)


def _look(answer: Any) -> None:
    watch = _watch.get()
    if watch is None:
        return
    watch.require_patience(answer)
    raw, decoded = answer.iter_raw, answer.iter_bytes
    answer.iter_raw = lambda *given, **options: watch.in_time(raw(*given, **options))
    answer.iter_bytes = lambda *given, **options: watch.bounded(decoded(*given, **options))


def _seconds_to_wait(headers: Mapping[str, str]) -> float:
    """What an answer has the client wait for, 0 where it does not say."""
    after, limit = headers.get("Retry-After", ""), headers.get("RateLimit", "")
    said = [float(seconds) for seconds in re.findall(r"\bt=(\d+)", limit)]
    if after.strip().isdecimal():
        said.append(float(after))
    else:
        with suppress(ValueError, OverflowError):
            said.append(parsedate_to_datetime(after).timestamp() - time.time())
    return max(said, default=0.0)


def explain(error: BaseException, repo_id: str, doing: str) -> HubError | None:
    """The HubError that says what ``error`` means; None if it is not of the Hub's making."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub_errors

    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)

    def first(*kind: type[BaseException]) -> BaseException | None:
        return next((e for e in chain if isinstance(e, kind)), None)

    # not every client wraps the answer in an error of its own, nor fills it in
    answer = next((e for e in chain if getattr(e, "response", None) is not None), None)
    if answer is not None:
        return _explain_answer(answer, repo_id, doing)
    if first(hub_errors.OfflineModeIsEnabled) or (
        constants.HF_HUB_OFFLINE and first(hub_errors.LocalEntryNotFoundError)
    ):
        return HubError(
            f"cannot {doing} {repo_id}: HF_HUB_OFFLINE is set, and it is not in the cache",
            found=f"the cache {constants.HF_HUB_CACHE}",
            hint="run once without HF_HUB_OFFLINE, or point HF_HOME to the cache that has it",
        )
    if first(UnicodeDecodeError) and (path := _file_without_text(repo_id)) is not None:
        return HubError(
            f"cannot {doing} {repo_id}: {path} holds no text",
            hint=f"the Hub's client wrote it; remove it with\nrm {shlex.quote(str(path))}\n"
            "and run the same again (after `hf auth login`, if it is the token)",
        )
    malformed = next((e for e in chain if isinstance(e, tuple(_MALFORMED))), None)
    if malformed is not None and _raised_in(malformed, _NETWORK):
        found = next(text for kind, text in _MALFORMED.items() if isinstance(malformed, kind))
        return not_the_hub(f"cannot {doing} {repo_id}", found=found, expected="JSON")
    if first(hub_errors.HFValidationError):
        return HubError(f"{repo_id!r} is no repository name", expected="owner/name")
    if isinstance(error, ImportError) and _raised_in(error, _NETWORK):
        return HubError(
            f"cannot {doing} {repo_id}: what the proxy of this session needs is not installed",
            found=str(error),
            hint="install it, or unset ALL_PROXY and HTTPS_PROXY, or name an http:// proxy there",
        )
    lost = next((e for e in chain if type(e).__module__.split(".")[0] in _NETWORK), None)
    if lost is None:
        lost = next((e for e in chain if isinstance(e, OSError) and e.errno in _LOST), None)
    if lost is not None or first(ConnectionError, TimeoutError):
        reason = _scrub(str(lost or error)) or type(lost or error).__name__
        return HubError(
            f"cannot {doing} {repo_id}: the connection to {constants.ENDPOINT} failed",
            found=reason.splitlines()[0],
            hint=f"check the network ({_addresses()}) and run the same again:\n"
            "what has arrived is kept",
        )
    if first(hub_errors.LocalEntryNotFoundError):
        return HubError(
            f"cannot {doing} {repo_id}: the Hub does not answer, and it is not in the cache",
            hint="check the network and run the same again",
        )
    if isinstance(error, (ValueError, OverflowError)) and _raised_in(error, _CLIENT):
        # such as a Content-Range without a number, or a branch in the cache that is no commit
        return HubError(
            f"cannot {doing} {repo_id}: the Hub's client makes nothing of what it was given",
            found=_scrub(str(error)),
            expected="answers as the Hub gives them, or files of its cache",
            hint=f"check HF_ENDPOINT, now {constants.ENDPOINT},\nand what is kept in "
            f"{constants.HF_HUB_CACHE}",
        )
    if any("Consistency check failed" in str(e) for e in chain if isinstance(e, OSError)):
        return HubError(
            f"cannot {doing} {repo_id}: the connection closed before all had arrived",
            hint="run the same again",
        )
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _NO_WRITING):
        found = str(error.filename or constants.HF_HUB_CACHE)
        return HubError(
            f"cannot {doing} {repo_id}: {error.strerror}",
            found=found,
            hint=_hint_for_folder(found),
        )
    return None


def _addresses() -> str:
    """The variables that say where the client connects to, as a part of a hint."""
    proxies = (f"{name}_PROXY" for name in ("HTTPS", "HTTP", "ALL"))
    names = (name for proxy in proxies for name in (proxy, proxy.lower()) if os.environ.get(name))
    return " or ".join(["or HF_ENDPOINT", *names])


def _hint_for_folder(path: str) -> str | None:
    """Which variable says where the client keeps the file at ``path``, if that is its own."""
    from huggingface_hub import constants

    of_cache = [name for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") if name in os.environ]
    for variable, folder in (
        (next(iter(of_cache), "HF_HOME"), constants.HF_HUB_CACHE),
        ("HF_HOME", constants.HF_HOME),
    ):
        if Path(path).resolve().is_relative_to(Path(folder).resolve()):
            return (
                f"the Hub's client keeps its files in {folder}: {variable} names another\n"
                "folder, which must be writable and have room"
            )
    return None


def _texts(repo_id: str) -> list[Path]:
    """What the client reads as text: the token, and the commits of branches."""
    from huggingface_hub import constants

    refs = Path(constants.HF_HUB_CACHE, f"models--{repo_id.replace('/', '--')}", "refs")
    return [Path(constants.HF_TOKEN_PATH), *sorted(refs.rglob("*"))]


def _require_no_pipes(repo_id: str, doing: str) -> None:
    """Raise HubError if a pipe or a device is where the client would wait for a text."""
    for path in _texts(repo_id):
        if is_there(path) and not is_file(path) and not is_folder(path):
            raise HubError(
                f"cannot {doing} {repo_id}: {path} is no file",
                found="a pipe, a device or a socket",
                expected="a file of the Hub's client, or none",
                hint=f"remove it: rm {shlex.quote(str(path))}",
            )


def _file_without_text(repo_id: str) -> Path | None:
    """A file that the client reads as text and that is none."""
    for path in _texts(repo_id):
        try:
            read_regular(path, PAPER_BYTES).decode()
        except UnicodeDecodeError:
            return path
        except (OSError, ValueError):
            continue
    return None


def is_of_another_form(error: Exception) -> bool:
    """Whether the client raised ``error`` while it made its objects of the JSON of an answer."""
    from huggingface_hub.errors import HFValidationError

    made = _raised_in(error, {"huggingface_hub"}) and not _raised_in(error, _NETWORK)
    return made and not isinstance(error, HFValidationError)


def _raised_in(error: BaseException, modules: set[str]) -> bool:
    """Whether a function of one of these top-level modules was being run."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__", "").split(".")[0] in modules for frame in frames)


def _explain_answer(answer: Any, repo_id: str, doing: str) -> HubError:
    from huggingface_hub import constants, get_token
    from huggingface_hub import errors as hub_errors

    status = answer.response.status_code
    said = _scrub(str(getattr(answer, "server_message", None) or "")).strip()
    found = f"HTTP {status}" + (f": {said.splitlines()[0]}" if said else "")
    has_token = get_token() is not None
    log_in = "log in with `hf auth login`, or set HF_TOKEN"

    def error(problem: str, hint: str) -> HubError:
        return HubError(f"cannot {doing} {repo_id}: {problem}", found=found, hint=hint)

    if isinstance(answer, hub_errors.GatedRepoError):
        return error(
            "its owner gives access on request",
            f"ask for it at {constants.ENDPOINT}/{repo_id}, then {log_in}",
        )
    if isinstance(answer, hub_errors.RevisionNotFoundError):
        return error("it has no such revision", "name a branch, a tag or a full commit id")
    if isinstance(answer, hub_errors.EntryNotFoundError):
        return error(
            "it does not hold the file that was asked for",
            "is it a repository of MLX ContentVec weights? Others are converted first:\n"
            "mlx-contentvec convert SOURCE -o FILE.safetensors",
        )
    if isinstance(answer, hub_errors.RepositoryNotFoundError):
        return error(
            "there is no such repository, or it is private and this token may not see it"
            if has_token
            else "there is no such repository, or it is private and no token was found",
            "check the name" + ("" if has_token else f"; for a private one, {log_in}"),
        )
    if status == 401:
        return error(
            "the Hub does not accept the token" if has_token else "the Hub asks for a token",
            f"make a token at {constants.ENDPOINT}/settings/tokens, then {log_in}",
        )
    if status == 403:
        access = "write access to" if doing.startswith("publish") else "access to the files of"
        return error(
            "the token may not do that" if has_token else "the Hub asks for a token",
            f"use a token with {access} that user or organisation:\n"
            f"{constants.ENDPOINT}/settings/tokens",
        )
    if status in (409, 412):
        return error(
            "somebody else changed it at the same time", "look at it, then run the same again"
        )
    if status == 429:
        return error("too many requests", "wait a few minutes and run the same again")
    if status >= 500:
        return error(
            "the Hub has a fault of its own",
            "wait a little and run the same again: what has arrived is kept\n"
            "(https://status.huggingface.co)",
        )
    return error("the Hub refuses", f"see what it says above; HF_ENDPOINT is {constants.ENDPOINT}")


def _scrub(text: str) -> str:
    """``text`` without anything that looks like a token."""
    return _TOKEN.sub("hf_...", text)
