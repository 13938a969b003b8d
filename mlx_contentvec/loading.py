"""A model by whatever name its weights have: a file, a folder, a repository or a known model."""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import HubError, did_you_mean, printable
from .files import expand_home, is_there
from .hub import resolve

if TYPE_CHECKING:
    from .model import ContentvecModel


def load(
    weights: str | os.PathLike[str], *, revision: str | None = None, dtype: str | None = None
) -> ContentvecModel:
    """The model with the weights that ``weights`` names.

    weights:  a file that ``mlx-contentvec convert`` wrote, a folder that holds one, a
              repository ``owner/name`` on the Hugging Face Hub, or the key of a known
              model, such as ``contentvec`` (``mlx-contentvec models`` lists them). A known
              model is downloaded, held to its checksums and converted the first time;
              afterwards it comes from the cache. Of a path and a key of the same name
              the path is taken.
    revision: branch, tag or commit of a repository
    dtype:    ``float32``, ``float16``, ``bfloat16`` or the name of a quantised variant,
              see ``ContentvecModel.from_pretrained``

    Raises HubError if there is nothing of that name, or it cannot be downloaded;
    WeightsError if the file is not one that this project wrote; IdentityError if what was
    downloaded is not the known file.
    """
    from .model import ContentvecModel

    name = os.fsdecode(weights)
    if not isinstance(weights, os.PathLike):
        found = _known(name)
        if found is not None:
            return ContentvecModel.from_pretrained(found, dtype=dtype)
    return ContentvecModel.from_pretrained(
        Path(name) if isinstance(weights, os.PathLike) else name, revision, dtype
    )


def find_weights(name: str) -> Path:
    """The file of weights that ``name`` means to :func:`load`, verified. Raises what that does."""
    return resolve(_known(name) or name)


def _known(name: str) -> Path | None:
    """The known model called ``name``, converted; None for what a path or a repository may be.

    Raises HubError for a bare word that is none of these.
    """
    if is_there(expand_home(name)):
        return None
    keys = known_keys()
    if name in keys:
        return _converted(name)
    if "/" in name or os.sep in name or Path(name).suffix:
        return None
    raise HubError(
        f"there are no weights at {printable(name)}, and no known model is called that",
        expected="a converted file, a folder with one, a repository like owner/name, or a name "
        "that `mlx-contentvec models` lists",
        hint=did_you_mean(name, keys),
    )


def known_keys() -> list[str]:
    """The keys of the known models."""
    return [row.key for row in _converter("known_files").KNOWN_FILES]


def _converted(key: str) -> Path:
    """The known model ``key``, converted, in the cache of downloads."""
    from huggingface_hub import cached_assets_path
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    # another release may convert otherwise
    release = _converter("conversion").__version__
    folder = cached_assets_path("mlx-contentvec", namespace="converted", subfolder=release)
    path = folder / f"{key}.safetensors"
    with WeakFileLock(folder / f"{key}.lock"):
        if not is_there(path):
            # an interrupted download is left there, and goes on the next time
            download = folder / f"{key}.download"
            download.mkdir(exist_ok=True)
            fetched = _converter("fetch").fetch(key, download)
            _converter("conversion").convert(fetched.path, path, fetched=fetched, force=True)
            shutil.rmtree(download, ignore_errors=True)
    return path


def _converter(module: str) -> Any:
    """A module of the converter, which stands above this package and is installed with it."""
    return importlib.import_module(f"contentvec_convert.{module}")
