"""Put a package on the Hugging Face Hub so that main shows all of it, proven, or nothing.

    1. the package is checked: hashes, parity, ledger, card (package.open_package)
    2. the repository is made, private, or found to be an earlier one of ours
    3. the files go up to a branch of their own, each blob once
    4. that branch is downloaded back and every file hashed
    5. one commit copies what was hashed to main, and the branch goes away

Until step 5 a reader of the repository sees what was there before. Whatever
breaks, running it again goes on: blobs that arrived are not sent twice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mlx_contentvec import hub, hub_client
from mlx_contentvec.errors import HubError, name_list
from mlx_contentvec.files import is_file
from mlx_contentvec.json_text import JsonError, read_object

from .evidence import LIBRARY, Package

if TYPE_CHECKING:
    from huggingface_hub import HfApi

#: where the files wait until they have been downloaded back and found right
STAGING = "mlx-contentvec-upload"
#: what the Hub itself puts into a repository
HUBS_OWN = {".gitattributes"}
#: files from this size on are sent one by one, before the commit that names them
LARGE = 1 << 20
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}

#: called with each step as it begins
Step = Callable[[str], None]


@dataclass(frozen=True)
class Publication:
    """What stands on the Hub now."""

    repo_id: str
    url: str
    #: commit of main that holds the package
    commit: str
    private: bool
    #: whether this run changed anything
    changed: bool


def publish(
    package: Package,
    repo_id: str,
    *,
    public: bool = False,
    replace: bool = False,
    step: Step = lambda _: None,
) -> Publication:
    """Upload a checked package, download it back, and only then show it on main.

    public:  let everybody see it, once it is proven; otherwise a new repository
             stays private, and an existing one as it is
    replace: put it in place of another package in an existing repository

    Raises HubError in plain words; main is then as it was before.
    """
    from huggingface_hub import HfApi, constants

    host = urlsplit(constants.ENDPOINT).hostname
    if package.stand_in is not None and host not in _LOOPBACK:
        raise HubError(
            "synthetic weights are never published",
            found=f"{package.folder}: {package.stand_in}",
            hint="convert the real checkpoint: mlx-contentvec fetch contentvec",
        )
    api = HfApi(library_name=LIBRARY)
    with hub_client.plain_words(repo_id, "publish to"):
        step("asking the Hub who you are")
        _require_writer(api)
        step(f"opening {repo_id}")
        head = _open_repository(api, repo_id, package, replace)
        if head is None:
            info = api.model_info(repo_id)
            commit, changed = str(info.sha), False
            step("downloading it back")
            _prove(repo_id, commit, package)
        else:
            with _staging(api, repo_id):
                staged = _upload(api, repo_id, package, step)
                step("downloading it back")
                _prove(repo_id, staged, package)
                step("showing it on main")
                commit, changed = _promote(api, repo_id, package, staged, head), True
        if public:
            api.update_repo_settings(repo_id, private=False)
        private = bool(api.model_info(repo_id).private)
    return Publication(repo_id, f"{constants.ENDPOINT}/{repo_id}", commit, private, changed)


def _require_writer(api: HfApi) -> None:
    from huggingface_hub import constants, get_token

    if get_token() is None:
        raise HubError(
            "no Hugging Face token was found",
            hint=f"make one with write access at {constants.ENDPOINT}/settings/tokens, then\n"
            "log in with `hf auth login`, or set HF_TOKEN",
        )
    user = api.whoami()
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(
            f"the token of {user['name']} may only read",
            hint="use one with write access:\n" + f"{constants.ENDPOINT}/settings/tokens",
        )


def _open_repository(api: HfApi, repo_id: str, package: Package, replace: bool) -> str | None:
    """Make the repository, or find it; the head of its main, None if it holds this very package."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.create_repo(repo_id, private=True)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
    info = api.model_info(repo_id)
    present = {sibling.rfilename for sibling in info.siblings or ()} - HUBS_OWN
    if not present:
        return str(info.sha)
    if not _is_ours(repo_id, present):
        raise HubError(
            f"{repo_id} is taken: it holds something else",
            found=name_list(sorted(present)),
            hint="give another name",
        )
    if _same(api, repo_id, str(info.sha), package):
        return None
    if not replace:
        raise HubError(
            f"{repo_id} holds another package already",
            found=name_list(sorted(present)),
            hint="--replace puts this one in its place (the old commit stays reachable), or give\n"
            "another name",
        )
    return str(info.sha)


def _is_ours(repo_id: str, present: set[str]) -> bool:
    """Whether a repository holds what this module put there."""
    from huggingface_hub import hf_hub_download

    if not {hub.CHECKSUMS, hub.CONFIG} <= present:
        return False
    try:
        config = read_object(Path(hf_hub_download(repo_id, hub.CONFIG)))
    except JsonError:
        return False
    return config.get("library_name") == LIBRARY


def _same(api: HfApi, repo_id: str, commit: str, package: Package) -> bool:
    """Whether a commit lists exactly the package's checksums."""
    from huggingface_hub import hf_hub_download

    stated = hub.read_checksums(Path(hf_hub_download(repo_id, hub.CHECKSUMS, revision=commit)))
    names = {sibling.rfilename for sibling in api.model_info(repo_id).siblings or ()}
    return stated == package.checksums and names - HUBS_OWN == set(package.names)


@contextmanager
def _staging(api: HfApi, repo_id: str) -> Iterator[None]:
    """A branch beside main, fresh; taken away when all went well, left for the next run if not."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.create_branch(repo_id, branch=STAGING)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        # an earlier run broke off: its blobs are on the Hub, its branch starts anew
        api.delete_branch(repo_id, branch=STAGING)
        api.create_branch(repo_id, branch=STAGING)
    yield
    api.delete_branch(repo_id, branch=STAGING)


def _upload(api: HfApi, repo_id: str, package: Package, step: Step) -> str:
    """Send every file to the staging branch; its commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    additions = {
        name: CommitOperationAdd(name, str(package.folder / name)) for name in package.names
    }
    sent: set[str] = set()
    for name in package.names:
        size = (package.folder / name).stat().st_size
        digest = package.checksums.get(name)
        if size < LARGE or digest is None or digest in sent:
            # a second name of a blob that is there by now costs nothing in the commit
            continue
        step(f"sending {name} ({size / 1e6:,.1f} MB)")
        api.preupload_lfs_files(
            repo_id, [additions[name]], revision=STAGING, num_threads=1, free_memory=False
        )
        sent.add(digest)
    stale = _names(api, repo_id, STAGING) - set(package.names) - HUBS_OWN
    step(f"committing {len(additions)} files")
    commit = api.create_commit(
        repo_id,
        [*additions.values(), *(CommitOperationDelete(name) for name in sorted(stale))],
        commit_message="Upload, to be proven",
        revision=STAGING,
    )
    return str(commit.oid)


def _prove(repo_id: str, commit: str, package: Package) -> None:
    """Download a commit, not from any cache, and hash every file."""
    from huggingface_hub import snapshot_download

    with tempfile.TemporaryDirectory(prefix="mlx-contentvec-") as fresh:
        folder = Path(snapshot_download(repo_id, revision=commit, cache_dir=fresh))
        wrong = []
        for name in package.names:
            path = folder / name
            found = hub.sha256_of(path) if is_file(path) else None
            if found != package.hash_of(name):
                wrong.append(f"{name} (sha256 {found})" if found else f"{name} (missing)")
        if wrong:
            raise HubError(
                f"what {repo_id} gives back is not what was sent",
                found=name_list(wrong),
                expected=name_list(f"{n} (sha256 {package.hash_of(n)})" for n in package.names)
                if len(wrong) == len(package.names)
                else "; ".join(f"sha256 {package.hash_of(w.split(' ')[0])}" for w in wrong),
                hint="nothing of it was shown on main; run the same again",
            )


def _promote(api: HfApi, repo_id: str, package: Package, staged: str, head: str) -> str:
    """One commit on main that holds what was proven and nothing else; its id."""
    from huggingface_hub import CommitOperationCopy, CommitOperationDelete

    stale = _names(api, repo_id, head) - set(package.names) - HUBS_OWN
    operations: list[Any] = [
        CommitOperationCopy(name, name, src_revision=staged) for name in package.names
    ]
    operations += [CommitOperationDelete(name) for name in sorted(stale)]
    commit = api.create_commit(
        repo_id,
        operations,
        commit_message=f"Publish {package.title}",
        commit_description=f"Made and verified by {LIBRARY} {package.version}.",
        revision="main",
        parent_commit=head,
    )
    proven, shown = _objects(api, repo_id, staged), _objects(api, repo_id, str(commit.oid))
    differing = [name for name in package.names if proven.get(name) != shown.get(name)]
    if differing:
        raise HubError(
            f"main of {repo_id} does not show what was proven",
            found=name_list(differing),
            hint=f"delete the commit {commit.oid} on the Hub, and run the same again",
        )
    return str(commit.oid)


def _names(api: HfApi, repo_id: str, revision: str) -> set[str]:
    return set(_objects(api, repo_id, revision))


def _objects(api: HfApi, repo_id: str, revision: str) -> dict[str, str]:
    """Path -> the object behind it (a blob's SHA-256, or git's id of a small file)."""
    from huggingface_hub.hf_api import RepoFile

    return {
        entry.path: entry.lfs.sha256 if entry.lfs is not None else entry.blob_id
        for entry in api.list_repo_tree(repo_id, revision=revision, recursive=True)
        if isinstance(entry, RepoFile)
    }
