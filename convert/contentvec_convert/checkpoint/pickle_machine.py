"""A closed reader of pickles: plain data and a fixed table of constructors, nothing else.

Python's own unpickler is a machine that imports what a file names and calls
it. This one has the same instructions and no import: a name becomes a
:class:`GlobalName`, a call looks the name up in the table ``constructors``
that the machine was given, and what is not in the table becomes an
:class:`InertRecord` that only remembers. It works on a stack of its own, so
depth costs no recursion, and everything it makes is counted against limits.

Source of the instructions: CPython's Lib/pickletools.py, protocols 0 to 5.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol

from . import limits
from .records import GlobalName, InertRecord
from .source_file import SourceFile
from .tensors import brief


class Bytes(Protocol):
    """What a pickle can be read from: bytes or a mapped file."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Any: ...
    def find(self, sub: bytes, start: int, end: int, /) -> int: ...


Constructor = Callable[["PickleMachine", tuple[Any, ...]], Any]
PersistentLoad = Callable[["PickleMachine", Any], Any]

#: modules that no checkpoint has a reason to name: a file that does is refused
#: loudly instead of read quietly. Safety does not rest on this list.
_PROGRAM_MODULES = frozenset(
    {
        "os", "posix", "nt", "sys", "subprocess", "_posixsubprocess", "pty", "shutil", "socket",
        "_socket", "ctypes", "_ctypes", "importlib", "_frozen_importlib",
        "_frozen_importlib_external", "imp", "runpy", "code", "codeop", "pickle", "_pickle",
        "cPickle", "dill", "cloudpickle", "marshal", "webbrowser", "timeit", "pdb", "bdb",
        "profile", "cProfile", "trace", "commands", "popen2", "pip", "ensurepip", "venv", "pydoc",
        "antigravity", "urllib", "urllib2", "requests", "http", "smtplib", "ftplib",
        "multiprocessing", "threading", "_thread", "asyncio",
    }
)  # fmt: skip
_BUILTINS = frozenset({"builtins", "__builtin__", "__builtins__"})
#: the builtins that are data, or that enum members are pickled with
_HARMLESS_BUILTINS = frozenset(
    {
        "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "getattr", "int",
        "list", "long", "object", "range", "set", "slice", "str", "tuple", "type", "unicode",
        "xrange", "Ellipsis", "NotImplemented",
    }
)  # fmt: skip
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z", re.ASCII)
_DUNDER = re.compile(r"__\w+__\Z", re.ASCII)
#: dunder names that pickles have a use for
_PLAIN_DUNDERS = frozenset(
    {"__builtin__", "__builtins__", "__main__", "__newobj__", "__newobj_ex__"}
)
_DECIMAL = re.compile(rb"[+-]?[0-9]{1,100}\Z")

_MARK = object()


class PickleMachine:
    """Reads one pickle at a time out of ``data``.

    ``constructors`` maps (module, name) to our own function that builds the
    value; ``persistent_load`` resolves a persistent id (a storage).
    Raises CorruptCheckpoint or UnsupportedCheckpoint, and nothing else.
    """

    def __init__(
        self,
        file: SourceFile,
        data: Bytes,
        constructors: Mapping[tuple[str, str], Constructor],
        persistent_load: PersistentLoad,
    ) -> None:
        self.file = file
        self._data = data
        self._constructors = constructors
        self._persistent_load = persistent_load
        self._budget = file.budget
        self._names: dict[tuple[str, str], GlobalName] = {}
        self._position = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def load(self, start: int = 0) -> tuple[Any, int]:
        """The value of the pickle at ``start``, and the position after it."""
        self._position = start
        self._stack = []
        self._memo = {}
        data, end, budget = self._data, len(self._data), self._budget
        while True:
            position = self._position
            if position >= end:
                self._ended()
            opcode = data[position]
            self._position = position + 1
            if opcode == _STOP:
                break
            budget.operations -= 1
            if budget.operations < 0:
                self._endless()
            handler = _DISPATCH[opcode]
            if handler is None:
                self.corrupt("it has an unknown instruction", found=f"byte 0x{opcode:02x}")
            handler(self)
        value = self._pop()
        if self._stack:
            self.corrupt("it ends with values left over")
        self._memo = {}
        return value, self._position

    # ---- refusing

    def corrupt(self, what: str, *, found: str | None = None) -> NoReturn:
        """Refuse the pickle as damaged, at the place where reading stands."""
        place = f"at byte {self._position:,} of the pickle"
        raise self.file.corrupt(
            f"its pickle cannot be read: {what}",
            found=place if found is None else f"{found} {place}",
        )

    def _ended(self) -> NoReturn:
        self.corrupt("it stops in the middle")

    # ---- raw bytes

    def _take(self, count: int) -> bytes:
        start = self._position
        if count > len(self._data) - start:
            self._ended()
        self._position = start + count
        taken: bytes = self._data[start : start + count]
        return taken

    def _text(self, count: int) -> bytes:
        """Bytes that become a value."""
        self.made_bytes(count)
        return self._take(count)

    def _line(self) -> bytes:
        end = self._data.find(b"\n", self._position, len(self._data))
        if end < 0:
            self._ended()
        line = self._text(end - self._position)
        self._position += 1
        return line

    def _number(self, form: struct.Struct) -> int:
        value: int = form.unpack(self._take(form.size))[0]
        return value

    # ---- stack

    def _pop(self) -> Any:
        if not self._stack:
            self.corrupt("it takes a value where there is none")
        value = self._stack.pop()
        if value is _MARK:
            self.corrupt("it takes a value where there is a mark")
        return value

    def _top(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            self.corrupt("it needs a value where there is none")
        return self._stack[-1]

    def _pop_to_mark(self) -> list[Any]:
        stack = self._stack
        index = len(stack) - 1
        while index >= 0 and stack[index] is not _MARK:
            index -= 1
        if index < 0:
            self.corrupt("it refers to a mark that is not there")
        items = stack[index + 1 :]
        del stack[index:]
        return items

    def made_container(self, count: int = 1) -> None:
        """Count containers against the limit; constructors call it for each one they make."""
        self._budget.containers -= count
        if self._budget.containers < 0:
            raise self.file.corrupt(
                "its pickle builds without end",
                found=f"more than {limits.PICKLE_CONTAINERS:,} lists, dicts and objects",
            )

    def made_bytes(self, count: int) -> None:
        """Count the bytes of texts against the limit."""
        self._budget.text_bytes -= count
        if self._budget.text_bytes < 0:
            raise self.file.corrupt(
                "its pickle is too long",
                expected=f"at most {limits.PICKLE_BYTES:,} bytes of text",
            )

    def worked(self, count: int) -> None:
        """Count what one call does, such as copying ``count`` values, as so many instructions."""
        self._budget.operations -= count
        if self._budget.operations < 0:
            self._endless()

    def _endless(self) -> NoReturn:
        raise self.file.corrupt(
            "its pickle is endless",
            found=f"more work than {limits.PICKLE_OPERATIONS:,} instructions",
        )

    def made_tensor(self) -> None:
        """Count a tensor against the limit."""
        self._budget.tensors -= 1
        if self._budget.tensors < 0:
            raise self.file.corrupt(
                "it has too many tensors", expected=f"at most {limits.TENSORS:,}"
            )

    # ---- keys of dicts and members of sets

    def key(self, value: Any) -> Any:
        """``value``, if hashing and comparing it is safe and cheap.

        Hashes of texts are seeded; those of tuples and floats are not, so that a
        file can choose any number of such keys with one hash. Each may then be
        compared with all before it: that many comparisons are counted as work,
        each as dear as its longest one, whether or not the hashes collide.
        """
        cost = self._key_cost(value)
        if cost:
            self.worked(cost * self._budget.slow_keys)
            self._budget.slow_keys += 1
        return value

    def _key_cost(self, value: Any) -> int:
        """How dear one comparison of a key is that hashes predictably; 0 for other keys."""
        if isinstance(value, float):
            return 1
        if not isinstance(value, tuple):
            self._scalar_key(value)
            return 0
        # the hash of a tuple walks everything below it, shared parts again and again
        cost, parts, pending = 1, 0, [value]
        while pending:
            for part in pending.pop():
                parts += 1
                if parts > limits.KEY_PARTS:
                    self.corrupt("it has a key that is too large")
                if isinstance(part, tuple):
                    pending.append(part)
                else:
                    self._scalar_key(part)
                    cost += 1 + (len(part) // 16 if isinstance(part, (str, bytes)) else 0)
        return cost

    def _scalar_key(self, value: Any) -> None:
        if isinstance(value, (float, GlobalName, InertRecord)) or value is None:
            return
        if isinstance(value, (str, bytes)):
            if len(value) > limits.KEY_CHARACTERS:
                self.corrupt("it has a key that is too long")
            return
        # integers hash to themselves modulo 2**61 - 1: without a bound on their
        # size a file could choose any number of them with one hash
        if not isinstance(value, int) or not -(2**63) <= value < 2**64:
            self.corrupt("it has a key that cannot be one", found=brief(value))

    def store(self, target: Any, pairs: list[Any]) -> None:
        """Put key, value, key, value ... of ``pairs`` into a dict or an inert record."""
        if len(pairs) % 2:
            self.corrupt("it stores a key without a value")
        if isinstance(target, InertRecord):
            target.entries.extend(zip(pairs[::2], pairs[1::2], strict=True))
            return
        if type(target) is not dict:
            self.corrupt("it stores an entry in what is not a dict", found=brief(target))
        for index in range(0, len(pairs), 2):
            key = self.key(pairs[index])
            if key in target:
                raise self.file.corrupt(f"the name {brief(key)} occurs twice in it")
            target[key] = pairs[index + 1]

    # ---- names and calls

    def named(self, module: object, name: object) -> GlobalName:
        """The inert name ``module.name``; refused if it is malformed or belongs to a program."""
        if not isinstance(module, str) or not isinstance(name, str):
            self.corrupt("it names something that is not text")
        known = self._names.get((module, name))
        if known is not None:
            return known
        if len(module) + len(name) > limits.NAME_CHARACTERS:
            self.corrupt("it names something with too long a name")
        in_module, in_name = module.split("."), name.split(".")
        if not all(map(_IDENTIFIER.match, in_module + in_name)):
            self.corrupt("it names what is no name", found=f"{brief(module)} {brief(name)}")
        if (
            in_module[0] in _PROGRAM_MODULES
            or (in_module[0] in _BUILTINS and name not in _HARMLESS_BUILTINS)
            or any(part in _PROGRAM_MODULES or part in _BUILTINS for part in in_name)
            or any(
                _DUNDER.match(part) and part not in _PLAIN_DUNDERS for part in in_module + in_name
            )
        ):
            raise self._program(f"{module}.{name}")
        self._budget.names -= 1
        if self._budget.names < 0:
            self.corrupt("it names too many classes and functions")
        made = GlobalName(module, name)
        self._names[module, name] = made
        return made

    def _program(self, name: str) -> Exception:
        return self.file.unsupported(
            f"its pickle names {brief(name)}, which no checkpoint needs and a program would use",
            found="a file that could run a program in other tools; nothing of it was run here",
            hint="do not open this file with anything else, and get the checkpoint from "
            "its own publisher",
        )

    def call(self, function: Any, args: Any, keywords: Any = None) -> Any:
        """What ``function(*args)`` stands for: a value from the table, or an inert record."""
        if not isinstance(function, GlobalName):
            self.corrupt("it calls what is not a name", found=brief(function))
        if not isinstance(args, tuple):
            self.corrupt("it calls with what are not arguments", found=brief(args))
        if keywords is not None and type(keywords) is not dict:
            self.corrupt("it calls with what are not keyword arguments", found=brief(keywords))
        constructor = self._constructors.get((function.module, function.name))
        if constructor is not None and not keywords:
            return constructor(self, args)
        if function.module in _BUILTINS and function.name == "getattr":
            # how Python 3.11 pickles a member of an enum: a class and the member's name
            plain = (
                len(args) == 2
                and isinstance(args[0], GlobalName)
                and isinstance(args[1], str)
                and _IDENTIFIER.match(args[1])
                and not _DUNDER.match(args[1])
            )
            if not plain:
                raise self._program("builtins.getattr")
        self.made_container()
        return InertRecord(function.module, function.name, args, keywords or None)

    # ---- the instructions, in the order of pickletools

    def _op_int(self) -> None:
        line = self._line()
        if line in (b"00", b"01"):
            self._stack.append(line == b"01")
        else:
            self._stack.append(self._decimal(line))

    def _op_long(self) -> None:
        line = self._line()
        self._stack.append(self._decimal(line[:-1] if line.endswith(b"L") else line))

    def _decimal(self, text: bytes) -> int:
        if not _DECIMAL.match(text):
            self.corrupt("it has an integer that is none", found=brief(text.decode("latin-1")))
        return int(text)

    def _op_binint(self) -> None:
        self._stack.append(self._number(_INT4))

    def _op_binint1(self) -> None:
        self._stack.append(self._take(1)[0])

    def _op_binint2(self) -> None:
        self._stack.append(self._number(_UINT2))

    def _op_long1(self) -> None:
        self._long(self._take(1)[0])

    def _op_long4(self) -> None:
        self._long(self._number(_INT4))

    def _long(self, length: int) -> None:
        if not 0 <= length <= limits.INTEGER_BYTES:
            self.corrupt("it has an integer of impossible length", found=f"{length} bytes")
        self._stack.append(int.from_bytes(self._take(length), "little", signed=True))

    def _op_binstring(self) -> None:
        length = self._number(_INT4)
        if length < 0:
            self.corrupt("it has a string of negative length")
        self._stack.append(_python2_text(self._text(length)))

    def _op_short_binstring(self) -> None:
        self._stack.append(_python2_text(self._text(self._take(1)[0])))

    def _op_binbytes(self) -> None:
        self._stack.append(self._text(self._number(_UINT4)))

    def _op_short_binbytes(self) -> None:
        self._stack.append(self._text(self._take(1)[0]))

    def _op_binbytes8(self) -> None:
        self._stack.append(self._text(self._number(_UINT8)))

    def _op_bytearray8(self) -> None:
        self._stack.append(bytearray(self._text(self._number(_UINT8))))

    def _op_none(self) -> None:
        self._stack.append(None)

    def _op_newtrue(self) -> None:
        self._stack.append(True)

    def _op_newfalse(self) -> None:
        self._stack.append(False)

    def _op_unicode(self) -> None:
        try:
            text = self._line().decode("raw-unicode-escape")
        except ValueError:
            self.corrupt("it has text that cannot be decoded")
        self._stack.append(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    def _unicode(self, raw: bytes) -> None:
        # a path that was no text in its file system comes as lone surrogates,
        # which nothing could print: they become replacement characters
        if not raw.isascii():
            # one character outside the basic plane gives every other one four bytes
            self.made_bytes(3 * len(raw))
        self._stack.append(raw.decode("utf-8", "replace"))

    def _op_short_binunicode(self) -> None:
        self._unicode(self._text(self._take(1)[0]))

    def _op_binunicode(self) -> None:
        self._unicode(self._text(self._number(_UINT4)))

    def _op_binunicode8(self) -> None:
        self._unicode(self._text(self._number(_UINT8)))

    def _op_float(self) -> None:
        line = self._line()
        try:
            if len(line) > 100:
                raise ValueError
            self._stack.append(float(line))
        except ValueError:
            self.corrupt("it has a number that is none")

    def _op_binfloat(self) -> None:
        self._stack.append(_FLOAT8.unpack(self._take(8))[0])

    def _op_empty_list(self) -> None:
        self.made_container()
        self._stack.append([])

    def _op_append(self) -> None:
        self._extend([self._pop()])

    def _op_appends(self) -> None:
        self._extend(self._pop_to_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is list:
            target.extend(items)
        elif isinstance(target, InertRecord):
            target.items.extend(items)
        else:
            self.corrupt("it appends to what is not a list", found=brief(target))

    def _op_list(self) -> None:
        self.made_container()
        self._stack.append(self._pop_to_mark())

    def _op_empty_tuple(self) -> None:
        self._stack.append(())

    def _op_tuple(self) -> None:
        self.made_container()
        self._stack.append(tuple(self._pop_to_mark()))

    def _op_tuple1(self) -> None:
        self.made_container()
        self._stack.append((self._pop(),))

    def _op_tuple2(self) -> None:
        self.made_container()
        second, first = self._pop(), self._pop()
        self._stack.append((first, second))

    def _op_tuple3(self) -> None:
        self.made_container()
        third, second, first = self._pop(), self._pop(), self._pop()
        self._stack.append((first, second, third))

    def _op_empty_dict(self) -> None:
        self.made_container()
        self._stack.append({})

    def _op_dict(self) -> None:
        self.made_container()
        target: dict[Any, Any] = {}
        self.store(target, self._pop_to_mark())
        self._stack.append(target)

    def _op_setitem(self) -> None:
        value, key = self._pop(), self._pop()
        self.store(self._top(), [key, value])

    def _op_setitems(self) -> None:
        pairs = self._pop_to_mark()
        self.store(self._top(), pairs)

    def _op_empty_set(self) -> None:
        self.made_container()
        self._stack.append(set())

    def _op_additems(self) -> None:
        items = self._pop_to_mark()
        target = self._top()
        if type(target) is not set:
            self.corrupt("it adds to what is not a set", found=brief(target))
        target.update(map(self.key, items))

    def _op_frozenset(self) -> None:
        self.made_container()
        self._stack.append(frozenset(map(self.key, self._pop_to_mark())))

    def _op_pop(self) -> None:
        if not self._stack:
            self.corrupt("it drops a value where there is none")
        self._stack.pop()

    def _op_dup(self) -> None:
        self._stack.append(self._top())

    def _op_mark(self) -> None:
        self._stack.append(_MARK)

    def _op_pop_mark(self) -> None:
        self._pop_to_mark()

    def _recall(self, index: int) -> None:
        if index not in self._memo:
            self.corrupt("it refers to a value it never made")
        self._stack.append(self._memo[index])

    def _op_get(self) -> None:
        self._recall(self._decimal(self._line()))

    def _op_binget(self) -> None:
        self._recall(self._take(1)[0])

    def _op_long_binget(self) -> None:
        self._recall(self._number(_UINT4))

    def _op_put(self) -> None:
        index = self._decimal(self._line())
        if not 0 <= index < 2**32:
            self.corrupt("it keeps a value under an impossible number")
        self._memo[index] = self._top()

    def _op_binput(self) -> None:
        self._memo[self._take(1)[0]] = self._top()

    def _op_long_binput(self) -> None:
        self._memo[self._number(_UINT4)] = self._top()

    def _op_memoize(self) -> None:
        self._memo[len(self._memo)] = self._top()

    def _op_global(self) -> None:
        module, name = self._line(), self._line()
        self._stack.append(
            self.named(module.decode("utf-8", "replace"), name.decode("utf-8", "replace"))
        )

    def _op_stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        self._stack.append(self.named(module, name))

    def _op_reduce(self) -> None:
        args, function = self._pop(), self._pop()
        self._stack.append(self.call(function, args))

    def _op_build(self) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, InertRecord):
            if target.state is not None:
                self.corrupt("it gives an object its state twice")
            target.state = state
        elif type(target) is not dict:
            self.corrupt("it gives a state to what has none", found=brief(target))
        # else: attributes of an OrderedDict, such as a state dict's _metadata:
        # nothing here needs them

    def _op_inst(self) -> None:
        module, name = self._line(), self._line()
        args = tuple(self._pop_to_mark())
        function = self.named(module.decode("utf-8", "replace"), name.decode("utf-8", "replace"))
        self._stack.append(self.call(function, args))

    def _op_obj(self) -> None:
        items = self._pop_to_mark()
        if not items:
            self.corrupt("it makes an object of no class")
        self._stack.append(self.call(items[0], tuple(items[1:])))

    def _op_newobj(self) -> None:
        self._op_reduce()

    def _op_newobj_ex(self) -> None:
        keywords, args, function = self._pop(), self._pop(), self._pop()
        self._stack.append(self.call(function, args, keywords))

    def _op_proto(self) -> None:
        version = self._take(1)[0]
        if version > 5:
            raise self.file.unsupported(
                "its pickle is of a newer kind", found=f"protocol {version}", expected="0 to 5"
            )

    def _op_frame(self) -> None:
        if self._number(_UINT8) > len(self._data) - self._position:
            self._ended()

    def _op_persid(self) -> None:
        self.corrupt("it refers to its storages in a way that torch does not")

    def _op_binpersid(self) -> None:
        self._stack.append(self._persistent_load(self, self._pop()))


def _python2_text(raw: bytes) -> str | bytes:
    """A string of Python 2, which did not tell text from bytes."""
    try:
        return raw.decode("utf-8")
    except ValueError:
        return raw


_STOP = ord(".")
_UINT2, _INT4, _UINT4 = struct.Struct("<H"), struct.Struct("<i"), struct.Struct("<I")
_UINT8, _FLOAT8 = struct.Struct("<Q"), struct.Struct(">d")

#: instruction byte -> method. Not here, and so refused: the extension registry
#: (0x82 to 0x84) and out-of-band buffers (0x97, 0x98), which no file can need,
#: and the quoted strings of protocol 0 ("S"), which torch has never written.
_INSTRUCTIONS: dict[bytes, str] = {
    b"I": "int",
    b"L": "long",
    b"J": "binint",
    b"K": "binint1",
    b"M": "binint2",
    b"\x8a": "long1",
    b"\x8b": "long4",
    b"T": "binstring",
    b"U": "short_binstring",
    b"B": "binbytes",
    b"C": "short_binbytes",
    b"\x8e": "binbytes8",
    b"\x96": "bytearray8",
    b"N": "none",
    b"\x88": "newtrue",
    b"\x89": "newfalse",
    b"V": "unicode",
    b"\x8c": "short_binunicode",
    b"X": "binunicode",
    b"\x8d": "binunicode8",
    b"F": "float",
    b"G": "binfloat",
    b"]": "empty_list",
    b"a": "append",
    b"e": "appends",
    b"l": "list",
    b")": "empty_tuple",
    b"t": "tuple",
    b"\x85": "tuple1",
    b"\x86": "tuple2",
    b"\x87": "tuple3",
    b"}": "empty_dict",
    b"d": "dict",
    b"s": "setitem",
    b"u": "setitems",
    b"\x8f": "empty_set",
    b"\x90": "additems",
    b"\x91": "frozenset",
    b"0": "pop",
    b"2": "dup",
    b"(": "mark",
    b"1": "pop_mark",
    b"g": "get",
    b"h": "binget",
    b"j": "long_binget",
    b"p": "put",
    b"q": "binput",
    b"r": "long_binput",
    b"\x94": "memoize",
    b"c": "global",
    b"\x93": "stack_global",
    b"R": "reduce",
    b"b": "build",
    b"i": "inst",
    b"o": "obj",
    b"\x81": "newobj",
    b"\x92": "newobj_ex",
    b"\x80": "proto",
    b"\x95": "frame",
    b"P": "persid",
    b"Q": "binpersid",
}


_DISPATCH: list[Callable[[PickleMachine], None] | None] = [None] * 256
for _code, _name in _INSTRUCTIONS.items():
    _DISPATCH[_code[0]] = getattr(PickleMachine, f"_op_{_name}")
