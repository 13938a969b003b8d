"""From the value that was pickled to names, tensors, configuration and the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_contentvec.errors import UnsupportedCheckpoint, name_list

from . import limits
from .constructors import TypedStorage
from .foreign import foreign_value
from .records import GlobalName, InertRecord
from .source_file import SourceFile
from .tensors import StoredTensor, TensorView, brief, checked_tensor

#: where a state dict is kept when it is not the whole value, most usual first.
#: The last is where RVC keeps a voice, which has to be read to be told apart.
STATE_DICT_KEYS = ("model", "state_dict", "model_state_dict", "weight")

#: what stands where a value contains itself
ENCLOSING = InertRecord("", "enclosing value")

_OMEGACONF_CONTAINERS = frozenset({"DictConfig", "ListConfig"})


@dataclass(frozen=True)
class Contents:
    """What one file holds: see :class:`Checkpoint` for the fields."""

    tensors: dict[str, StoredTensor]
    extra: dict[str, Any]
    config: dict[str, Any] | None
    metadata: dict[str, str]


def contents(file: SourceFile, value: Any) -> Contents:
    """Find the state dict in ``value`` and put everything else in order.

    Raises UnsupportedCheckpoint if there is none, CorruptCheckpoint if a
    tensor does not fit its storage (the tensor is named).
    """
    path = state_dict_path(value)
    foreign = foreign_value(value) if path is None else None
    if foreign is not None:
        raise foreign.error(file)
    if path is None:
        raise _no_state_dict(file, value)
    state: dict[Any, Any] = value
    rest: dict[Any, Any] = {}
    for key in path:
        state = state[key]
    bare = not path
    tensors: dict[str, StoredTensor] = {}
    for key, stored in state.items():
        if isinstance(stored, TensorView):
            tensors[key] = checked_tensor(tensor_name(file, key), stored)
            if len(tensors) > limits.TENSORS:
                raise file.corrupt(
                    "it has too many tensors", expected=f"at most {limits.TENSORS:,}"
                )
        elif isinstance(stored, InertRecord) and stored.module.startswith("torch._"):
            raise file.unsupported(
                f"the tensor {brief(key)} is of a kind that cannot be read",
                found=brief(stored),
                expected="a dense tensor",
            )
        elif bare:
            rest[key] = stored
        elif stored is not None:
            raise file.unsupported(
                f"{brief(key)} stands among the tensors and is none", found=brief(stored)
            )
    if not bare:
        rest = _without(value, path)
    settler = _Settler(file)
    extra = {
        key if isinstance(key, str) else brief(key): settler.settle(stored, brief(key))
        for key, stored in rest.items()
    }
    return Contents(tensors, extra, _config(extra), {})


def state_dict_path(value: Any) -> tuple[str, ...] | None:
    """The keys that lead to the state dict: () if it is ``value`` itself, None if there is none."""
    path: tuple[str, ...] = ()
    found: tuple[str, ...] | None = None
    while type(value) is dict and len(path) <= len(STATE_DICT_KEYS):
        holds_tensors = any(isinstance(stored, TensorView) for stored in value.values())
        if holds_tensors and all(isinstance(key, str) for key in value):
            # the innermost: a trainer may keep a step counter, a tensor, beside the model
            found = path
        key = next((key for key in STATE_DICT_KEYS if type(value.get(key)) is dict), None)
        if key is None:
            break
        path, value = (*path, key), value[key]
    return found


def tensor_name(file: SourceFile, name: str) -> str:
    """``name``, if it can be shown and stored."""
    if not name or len(name) > limits.NAME_CHARACTERS or not name.isprintable():
        raise file.corrupt("a tensor has an impossible name", found=brief(name))
    return name


def _without(value: dict[Any, Any], path: tuple[str, ...]) -> dict[Any, Any]:
    """``value`` without the state dict at the end of ``path``."""
    rest = {key: stored for key, stored in value.items() if key != path[0]}
    if len(path) > 1:
        inner = _without(value[path[0]], path[1:])
        if inner:
            rest[path[0]] = inner
    return rest


def _no_state_dict(file: SourceFile, value: Any) -> UnsupportedCheckpoint:
    places = " or ".join(f'"{key}"' for key in STATE_DICT_KEYS)
    owner = value
    if type(value) is dict:
        owner = next((value[key] for key in STATE_DICT_KEYS if key in value), value)
    if isinstance(owner, InertRecord):
        return file.unsupported(
            "it holds a whole pickled model, which only its own program can open",
            found=f"an object of the class {brief(owner)}",
            expected="a state dict: names and tensors",
            hint="in that program, save model.state_dict() instead of model",
        )
    found = brief(value)
    if type(value) is dict:
        found = f"a dict of {name_list(brief(key, 40) for key in value) or 'nothing'}"
    return file.unsupported(
        "it holds no state dict",
        found=found,
        expected=f"names and tensors, at the top or under {places}",
    )


def _config(extra: dict[str, Any]) -> dict[str, Any] | None:
    """fairseq's configuration: the dict ``cfg``, or before that the Namespace ``args``."""
    cfg = extra.get("cfg")
    if type(cfg) is dict:
        return cfg
    for stored in (cfg, extra.get("args")):
        if isinstance(stored, InertRecord) and stored.name == "Namespace":
            options: Any = stored.state
            return {"model": options} if type(options) is dict else None
    return None


class _Settler:
    """Copies what was unpickled into plain values that are safe to walk.

    A hostile file can nest without end, contain itself, or refer to one value
    so often that walking it never finishes. The copy does none of these:
    depth and the number of reachable values are bounded, and a value inside
    itself becomes the record ENCLOSING.
    """

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        #: id -> (copy, values reachable from it, levels below it); the originals stay alive
        self._done: dict[int, tuple[Any, int, int]] = {}
        self._open: set[int] = set()

    def settle(self, value: Any, name: str) -> Any:
        """The copy of ``value``; a tensor inside gets a name that starts with ``name``."""
        copy, count, _ = self._copy(value, name, 0)
        self._file.budget.values -= count
        self._check(0, 0)
        return copy

    def _check(self, count: int, depth: int) -> None:
        if count > self._file.budget.values:
            raise self._file.corrupt(
                "its pickle refers to the same values again and again",
                found=f"more than {limits.VALUES:,} values",
            )
        if depth > limits.NESTING:
            raise self._file.corrupt(
                "its pickle nests too deeply", expected=f"at most {limits.NESTING} levels"
            )

    def _copy(self, value: Any, name: str, depth: int) -> tuple[Any, int, int]:
        if isinstance(value, (str, bytes, bytearray)):
            return value, 1 + len(value) // 256, 0
        if value is None or isinstance(value, (bool, int, float, complex)):
            return value, 1, 0
        if isinstance(value, GlobalName):
            return InertRecord(value.module, value.name), 1, 0
        if isinstance(value, TypedStorage):
            return InertRecord("torch.storage", "TypedStorage"), 1, 0
        identity = id(value)
        if identity in self._open:
            return ENCLOSING, 1, 0
        known = self._done.get(identity)
        if known is None:
            self._check(0, depth)
            self._open.add(identity)
            known = self._done[identity] = self._copy_container(value, name, depth)
            self._open.discard(identity)
        self._check(known[1], depth + known[2])
        return known

    def _copy_container(self, value: Any, name: str, depth: int) -> tuple[Any, int, int]:
        if isinstance(value, TensorView):
            return checked_tensor(name, value), 1, 0
        if isinstance(value, InertRecord):
            return self._copy_record(value, name, depth)
        count, below = 1, 0

        def inner(part: Any, label: object) -> Any:
            nonlocal count, below
            inside = f"{name}.{brief(label)}" if len(name) < limits.NAME_CHARACTERS else name
            copy, its_count, its_depth = self._copy(part, inside, depth + 1)
            count += its_count
            below = max(below, its_depth + 1)
            return copy

        made: Any
        if isinstance(value, dict):
            made = {_plain_key(key): inner(part, key) for key, part in value.items()}
        elif isinstance(value, (set, frozenset)):
            made = type(value)(map(_plain_key, value))
            count += len(made)
        else:
            made = type(value)([inner(part, index) for index, part in enumerate(value)])
        return made, count, below

    def _copy_record(self, record: InertRecord, name: str, depth: int) -> tuple[Any, int, int]:
        plain = _omegaconf_content(record)
        if plain is not record:
            return self._copy(plain, name, depth + 1)
        made = InertRecord(record.module, record.name, record.args, state=record.state)
        count, below = 1, 0
        for part in ("args", "keywords", "state", "items", "entries"):
            stored = getattr(record, part)
            if stored:
                copy, its_count, its_depth = self._copy(stored, name, depth + 1)
                setattr(made, part, copy)
                count += its_count
                below = max(below, its_depth + 1)
        return made, count, below


def _plain_key(value: Any) -> Any:
    """A key as it was, which was small and hashable, its objects reduced to their names."""
    if isinstance(value, tuple):
        return tuple(map(_plain_key, value))
    if isinstance(value, (GlobalName, InertRecord)):
        return InertRecord(value.module, value.name)
    return value


def _omegaconf_content(record: InertRecord) -> Any:
    """What an omegaconf node holds, or ``record`` if it is none.

    Some fairseq versions of 2020 and 2021 pickled their configuration as
    omegaconf objects. Source: omegaconf/basecontainer.py and nodes.py.
    """
    if record.module.split(".")[0] != "omegaconf" or type(record.state) is not dict:
        return record
    if record.name in _OMEGACONF_CONTAINERS and "_content" in record.state:
        return record.state["_content"]
    if "_val" not in record.state:
        return record
    value = record.state["_val"]
    if record.name == "EnumNode" and isinstance(value, InertRecord) and value.args:
        return value.args[-1]
    return value
