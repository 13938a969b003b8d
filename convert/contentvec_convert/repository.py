"""Models in repositories of the Hugging Face Hub: which files they are, and what the Hub states.

The Hub states the size and the SHA-256 of every large file, and a download is held to
them: of a row of the table of known files without a checksum of its own, and of a
repository that is named by its address.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from mlx_contentvec import hub, hub_client
from mlx_contentvec.config import PRESETS, ModelConfig
from mlx_contentvec.errors import HubError, IdentityError, name_list, printable

from .checkpoint.folder import CONFIG_FILE, INDEX_FILES, WEIGHT_FILES, shard_names
from .identity import Identity
from .known_files import KNOWN_FILES, KnownFile

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

HUB = "https://huggingface.co/"
#: files of a Hugging Face folder that shape the result without holding tensors
BESIDE = (CONFIG_FILE, "preprocessor_config.json", "processor_config.json")
#: no HuBERT is as large with the state of its optimizer
MOST_BYTES = 32 << 30
#: what a file of weights ends in; a name that does not exist here is looked up on the Hub
#: only if it does not look like such a file
_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".onnx", ".zip")
_TORCH = (".pt", ".pth")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Fetched:
    """A source that was downloaded, and what it was held to."""

    #: the file, or the folder of a model of several files
    path: Path
    #: address and commit, as one line
    origin: str
    #: name of each weight file -> the SHA-256 that the table or the Hub states
    sha256: Mapping[str, str] = field(default_factory=dict)
    #: what each weight file was found to be
    identities: tuple[Identity, ...] = ()
    #: its row in the table of known files, if it was asked for by that
    row: KnownFile | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """For the ledger: where the source comes from, if its checksums do not show it."""
        if self.row is not None and self.row.verifiable:
            return ()
        asked = "" if self.row is None else f" as {self.row.key}"
        return (f"downloaded{asked} from {self.origin}, held to the SHA-256 that the Hub states",)

    def check(self, identity: Identity) -> None:
        """Raise IdentityError if the weights are no longer the files that were downloaded."""
        for file in identity.files:
            if file.name in self.sha256 and file.sha256 != self.sha256[file.name]:
                raise IdentityError(
                    f"{file.name} is no longer the file that was downloaded",
                    found=f"sha256 {file.sha256}",
                    expected=f"sha256 {self.sha256[file.name]}, as the Hub states it",
                    hint="remove it and run the same again",
                )

    def check_model(self, config: ModelConfig) -> None:
        """Raise IdentityError if a row without a checksum stands for another architecture."""
        if self.row is None or self.row.verifiable:
            return
        preset = PRESETS[self.row.architecture]
        differing = [name for name in _SHAPE if getattr(config, name) != getattr(preset, name)]
        if differing:
            raise IdentityError(
                f"what {self.origin} serves is not {self.row.key}",
                found=", ".join(f"{name} {getattr(config, name)}" for name in differing),
                expected=", ".join(f"{name} {getattr(preset, name)}" for name in differing),
                hint="it has changed at its home; convert the file or folder by its own name, if "
                "that is the\nmodel you want",
            )


#: fields of a configuration by which an architecture is known. The number of heads is not
#: among them: a Korean base has 8
_SHAPE = (
    "encoder_layers",
    "encoder_layers_1",
    "encoder_embed_dim",
    "encoder_ffn_embed_dim",
    "extractor_norm",
    "layer_norm_first",
    "conv_layers",
)


def is_address(name: str) -> bool:
    """Whether ``name`` can be ``owner/name`` on the Hub, or ``owner/name/path`` inside it.

    What has the name of a file of weights is not: it is a path of this machine.
    """
    owner, *rest = name.split("/")
    if len(rest) == 1 and Path(name).suffix in _SUFFIXES:
        return False
    plain = all(part not in ("", ".", "..") and part.isprintable() for part in rest)
    return plain and hub.is_repo_id("/".join([owner, *rest[:1]]))


def find_model(address: str, revision: str | None = None) -> tuple[KnownFile, ...]:
    """The weight files behind an address, each as a row with what the Hub states of it.

    address:  ``owner/name``, or ``owner/name/path`` for a folder or a file inside it
    revision: branch, tag or commit; the main branch by default

    Raises HubError if there is no such repository or no model that can be chosen.
    """
    from huggingface_hub import HfApi

    owner, name, *inside = address.split("/")
    repo_id = f"{owner}/{name}"
    no_repository = hub_client.not_the_hub(
        f"cannot look at {repo_id}",
        found="JSON of another form",
        expected="the description of a repository",
    )
    with hub_client.plain_words(repo_id, "look at", hub_client.PAPER_BYTES):
        try:
            info = HfApi(library_name="mlx-contentvec").model_info(repo_id, revision=revision)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if hub_client.is_of_another_form(error):
                raise no_repository from error
            raise
    files = [entry.rfilename for entry in info.siblings or ()]
    if not all(isinstance(file, str) for file in files):
        raise no_repository
    paths = [PurePosixPath(file) for file in files]
    commit = None if info.sha is None else str(info.sha)
    wanted = PurePosixPath(*inside)
    is_file = bool(inside) and wanted in paths
    folder = wanted.parent if is_file else wanted
    names = {path.name for path in paths if path.parent == folder and path.name.isprintable()}
    if not is_file:
        weights = _weight_files(repo_id, commit, folder, names)
    elif wanted.name in INDEX_FILES:
        weights = _shards(repo_id, commit, wanted)
    else:
        weights = [wanted.name]
    index = tuple(file for file in weights if file in INDEX_FILES)
    is_folder = CONFIG_FILE in names and weights[0] in (*WEIGHT_FILES, *INDEX_FILES)
    beside = (*(file for file in BESIDE if file in names and is_folder), *index)
    return tuple(
        stated(
            KnownFile(
                key=str(folder / file),
                names=(file,),
                what=f"a file of {repo_id}",
                home=HUB + repo_id,
                hub_path=str(folder / file),
                revision=commit,
                beside=beside,
                form="transformers" if beside else "fairseq",
            )
        )
        for file in weights
        if file not in INDEX_FILES
    )


def _weight_files(
    repo_id: str, commit: str | None, folder: PurePosixPath, names: set[str]
) -> list[str]:
    """The weights among the files of a folder, and the index of those in several files."""
    for single, index in zip(WEIGHT_FILES, INDEX_FILES, strict=True):
        if single in names:
            return [single]
        if index in names:
            return _shards(repo_id, commit, folder / index)
    earlier = [name for name in names if name in hub.WEIGHTS]
    torch = sorted(name for name in names if PurePosixPath(name).suffix in _TORCH)
    known = {name for row in KNOWN_FILES for name in row.names}
    for candidates in (earlier, [name for name in torch if name in known], torch):
        if len(candidates) == 1:
            return candidates
    address = "/".join([repo_id, *folder.parts])
    raise HubError(
        f"{printable(address)} holds no model that can be chosen",
        found=name_list(map(printable, torch)) if torch else f"{len(names)} files, none of weights",
        expected=f"{name_list(WEIGHT_FILES)}, or one .pt",
        hint=f"name the file or its folder: mlx-contentvec convert {printable(address)}/NAME",
    )


def _shards(repo_id: str, commit: str | None, index: PurePosixPath) -> list[str]:
    """An index, and the weights that it names beside it."""
    return [index.name, *shard_names(small_file(repo_id, str(index), commit))]


def stated(row: KnownFile) -> KnownFile:
    """``row`` with the size, the SHA-256 and the commit that the Hub states for its file.

    Raises HubError if the Hub states no SHA-256 or commit, or a size that no such model has.
    """
    metadata = _metadata(row)
    if not _SHA256.fullmatch(metadata.etag or ""):
        raise HubError(
            f"the Hub states no SHA-256 for {row.hub_path} of {repository_of(row)}",
            hint="download it by hand and convert the file or its folder",
        )
    return replace(row, size=metadata.size, sha256=metadata.etag, revision=metadata.commit_hash)


def with_stated_size(row: KnownFile) -> KnownFile:
    """``row``, whose checksums are known, with the size that the Hub states for its file.

    Raises HubError for a size that no such model has, IdentityError if the Hub states
    another SHA-256. A mirror may state none.
    """
    metadata = _metadata(row)
    states_one = _SHA256.fullmatch(metadata.etag or "") is not None
    if states_one and row.sha256 not in (None, metadata.etag):
        raise IdentityError(
            f"what {repository_of(row)} serves is not {row.key}",
            found=f"sha256 {metadata.etag}, as the Hub states it",
            expected=f"sha256 {row.sha256}",
            hint="the file has changed at its home; convert it by its address, if that is the\n"
            "model you want",
        )
    return replace(row, size=metadata.size)


def _metadata(row: KnownFile) -> HfFileMetadata:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    repo_id, path = repository_of(row), row.hub_path or ""
    with hub_client.plain_words(repo_id, f"look at {row.hub_path} of"):
        url = hf_hub_url(repo_id, path, revision=row.revision)
        metadata = get_hf_file_metadata(url, library_name="mlx-contentvec")
    hub_client.require_plausible_metadata(repo_id, path, metadata, MOST_BYTES)
    return metadata


def small_file(repo_id: str, path: str, revision: str | None) -> Path:
    """A configuration of a repository, in the client's cache. Raises HubError if it is large."""
    with hub_client.plain_words(repo_id, f"download {path} from"):
        hub_client.require_plausible_file(repo_id, path, revision)
        return hub_client.download(repo_id, path, revision)


def repository_of(row: KnownFile) -> str:
    """``owner/name`` of the home of a row."""
    return row.home.removeprefix(HUB)


def folder_of(row: KnownFile) -> str:
    """What the folder of a row is called at its home: a folder there, or the repository."""
    return PurePosixPath(repository_of(row), row.hub_path or "").parent.name


def origin_of(rows: Iterable[KnownFile]) -> str:
    """Where rows come from, as one line."""
    row = next(iter(rows))
    commit = f" at {row.revision[:12]}" if row.revision else ""
    return f"{repository_of(row)}/{row.hub_path}{commit}"
