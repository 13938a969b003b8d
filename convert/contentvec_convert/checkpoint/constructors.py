"""The fixed table: every call of a pickle that has a meaning here.

What a checkpoint calls and this table lacks becomes an inert record. The
functions check every argument themselves: a file can call them with anything.

Source of the calls: torch/_utils.py, torch/_tensor.py, torch/storage.py.
"""

from __future__ import annotations

from typing import Any

from .pickle_machine import Constructor, PickleMachine
from .records import GlobalName, InertRecord
from .tensors import DTYPES, Storage, TensorView, brief

#: class of a typed storage -> dtype of its elements
STORAGE_DTYPES: dict[str, str] = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
UNTYPED_STORAGES = frozenset({("torch.storage", "UntypedStorage"), ("torch", "UntypedStorage")})

#: instructions that a copied entry counts as: it takes memory as well as time
_ENTRY_WORK = 8


class TypedStorage:
    """A storage as a persistent id names it: bytes, and their dtype if the id gives one."""

    __slots__ = ("dtype", "storage")

    def __init__(self, storage: Storage, dtype: str | None) -> None:
        self.storage = storage
        self.dtype = dtype


def _tensor_v2(machine: PickleMachine, args: tuple[Any, ...]) -> TensorView:
    """(storage, offset, shape, strides, requires_grad, hooks[, metadata])."""
    return _tensor(machine, args)


def _tensor_v3(machine: PickleMachine, args: tuple[Any, ...]) -> TensorView:
    """The same, with the dtype after the hooks; its storage is untyped."""
    if len(args) < 7 or not isinstance(args[6], GlobalName) or args[6].module != "torch":
        machine.corrupt("it makes a tensor of no dtype")
    if args[6].name not in DTYPES:
        raise machine.file.unsupported(
            f"it has a tensor of dtype {args[6]}", expected=", ".join(DTYPES)
        )
    return _tensor(machine, args, args[6].name)


def _tensor(machine: PickleMachine, args: tuple[Any, ...], dtype: str | None = None) -> TensorView:
    if len(args) < 4 or not isinstance(args[0], TypedStorage):
        machine.corrupt("it makes a tensor of no storage")
    dtype = dtype or args[0].dtype
    if dtype is None:
        machine.corrupt("it makes a tensor of no dtype")
    machine.made_tensor()
    return TensorView(args[0].storage, dtype, args[1], args[2], args[3])


def _parameter(machine: PickleMachine, args: tuple[Any, ...]) -> Any:
    """(tensor, requires_grad, hooks[, state]): the tensor itself."""
    if not args or not isinstance(args[0], (TensorView, InertRecord)):
        machine.corrupt("it makes a parameter of no tensor")
    return args[0]


def _tensor_from_type(machine: PickleMachine, args: tuple[Any, ...]) -> Any:
    """(function, class, arguments, state): a tensor with attributes, or of a subclass."""
    if len(args) != 4 or not isinstance(args[0], GlobalName):
        machine.corrupt("it makes a tensor in an unknown way")
    if args[0].name.startswith("_rebuild_from_type"):
        # a call of this function inside itself: torch never writes it, and it could go on
        machine.corrupt("it makes a tensor of itself")
    return machine.call(args[0], args[2])


def _dict(machine: PickleMachine, args: tuple[Any, ...]) -> dict[Any, Any]:
    """OrderedDict, dict, Counter: nothing, another dict, or pairs."""
    machine.made_container()
    made: dict[Any, Any] = {}
    if not args:
        return made
    if len(args) > 1:
        machine.corrupt("it makes a dict of more than one thing")
    if type(args[0]) is dict:
        # key by key, because comparing them again is counted as at the first time
        machine.worked(_ENTRY_WORK * len(args[0]))
        machine.store(made, [part for pair in args[0].items() for part in pair])
        return made
    if not isinstance(args[0], (list, tuple)):
        machine.corrupt("it makes a dict of what is none", found=brief(args[0]))
    machine.worked(_ENTRY_WORK * len(args[0]))
    for pair in args[0]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            machine.corrupt("it makes a dict of what are not pairs")
        machine.store(made, list(pair))
    return made


def _defaultdict(machine: PickleMachine, args: tuple[Any, ...]) -> dict[Any, Any]:
    """The factory is forgotten."""
    return _dict(machine, args[1:])


def _members(machine: PickleMachine, args: tuple[Any, ...]) -> list[Any]:
    if not args:
        return []
    if len(args) > 1 or not isinstance(args[0], (list, tuple, set, frozenset)):
        machine.corrupt("it makes a collection of what is none")
    machine.worked(_ENTRY_WORK * len(args[0]))
    return list(args[0])


def _set(machine: PickleMachine, args: tuple[Any, ...]) -> set[Any]:
    machine.made_container()
    return set(map(machine.key, _members(machine, args)))


def _frozenset(machine: PickleMachine, args: tuple[Any, ...]) -> frozenset[Any]:
    machine.made_container()
    return frozenset(map(machine.key, _members(machine, args)))


def _list(machine: PickleMachine, args: tuple[Any, ...]) -> list[Any]:
    machine.made_container()
    return _members(machine, args)


def _tuple(machine: PickleMachine, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """tuple, torch.Size."""
    machine.made_container()
    return tuple(_members(machine, args))


def _complex(machine: PickleMachine, args: tuple[Any, ...]) -> complex:
    if len(args) != 2 or not all(isinstance(part, float) for part in args):
        machine.corrupt("it makes a complex number of what are not two numbers")
    return complex(*args)


def _encode(machine: PickleMachine, args: tuple[Any, ...]) -> bytes:
    """_codecs.encode(text, "latin1"): how protocol 2 writes bytes."""
    if len(args) != 2 or not isinstance(args[0], str) or args[1] not in ("latin1", "latin-1"):
        machine.corrupt("it makes bytes in an unknown way")
    machine.made_bytes(len(args[0]))
    try:
        return args[0].encode("latin-1")
    except ValueError:
        machine.corrupt("it makes bytes of text that has none")


def _bytes(machine: PickleMachine, args: tuple[Any, ...]) -> bytes:
    """How protocol 2 writes empty bytes; a number in place of nothing would mean that many."""
    if args:
        machine.corrupt("it makes bytes in an unknown way")
    return b""


def _bytearray(machine: PickleMachine, args: tuple[Any, ...]) -> bytearray:
    if len(args) > 1 or not all(isinstance(part, bytes) for part in args):
        machine.corrupt("it makes bytes in an unknown way")
    machine.made_container()
    machine.made_bytes(sum(map(len, args)))
    return bytearray(*args)


def _reconstruct(machine: PickleMachine, args: tuple[Any, ...]) -> InertRecord:
    """copyreg._reconstructor(class, base, value): an object of protocol 0 or 1."""
    if len(args) != 3 or not isinstance(args[0], GlobalName):
        machine.corrupt("it makes an object of no class")
    machine.made_container()
    return InertRecord(args[0].module, args[0].name, args[2:])


CONSTRUCTORS: dict[tuple[str, str], Constructor] = {
    ("torch._utils", "_rebuild_tensor"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type"): _tensor_from_type,
    ("torch._tensor", "_rebuild_from_type_v2"): _tensor_from_type,
    ("torch", "Size"): _tuple,
    ("collections", "OrderedDict"): _dict,
    ("collections", "Counter"): _dict,
    ("collections", "defaultdict"): _defaultdict,
    ("_codecs", "encode"): _encode,
    ("copyreg", "_reconstructor"): _reconstruct,
    ("copy_reg", "_reconstructor"): _reconstruct,
}
for _module in ("builtins", "__builtin__"):
    CONSTRUCTORS |= {
        (_module, "dict"): _dict,
        (_module, "list"): _list,
        (_module, "tuple"): _tuple,
        (_module, "set"): _set,
        (_module, "frozenset"): _frozenset,
        (_module, "complex"): _complex,
        (_module, "bytes"): _bytes,
        (_module, "bytearray"): _bytearray,
    }
