# SPDX-License-Identifier: MIT
"""The types of QMP's arguments and replies: what fits them, and QEMU's words for what does not.

A value is checked from the outside in and in the order of the schema; a struct complains of a
member that it does not know after all that it knows are right. Most messages name a value by its
path, as ``actions[0].data.node``; those on enums, alternates and the range of integers by its last
part alone, which an element of a list does not have: QEMU calls it ``null``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..errors import InvalidError


class SchemaError(InvalidError):
    """Arguments that are not as the command's schema says."""


@dataclass(frozen=True)
class Where:
    """The place of a value: its path, and its own name if it has one."""

    path: str = ""
    name: str = "null"

    def member(self, name: str) -> Where:
        return Where(f"{self.path}.{name}" if self.path else name, name)

    def element(self, index: int) -> Where:
        return Where(f"{self.path}[{index}]")

    def expected(self, what: str) -> SchemaError:
        return SchemaError(f"Invalid parameter type for '{self.path}', expected: {what}")


class Type(Protocol):
    def check(self, value: Any, where: Where) -> None:
        """
        :raises SchemaError: if the value does not fit
        """


class Str:
    def check(self, value: Any, where: Where) -> None:
        if not isinstance(value, str):
            raise where.expected("string")
        try:
            value.encode()
        except UnicodeEncodeError:  # half a surrogate pair; in JSON the server refuses it
            raise where.expected("string") from None


class Bool:
    def check(self, value: Any, where: Where) -> None:
        if not isinstance(value, bool):
            raise where.expected("boolean")


class Anything:
    """Any value of JSON."""

    def check(self, value: Any, where: Where) -> None:
        pass


class Int:
    """A signed one of 64 bits."""

    def check(self, value: Any, where: Where) -> None:
        if type(value) is not int or not -(1 << 63) <= value < 1 << 63:
            raise where.expected("integer")


class Uint32:
    def check(self, value: Any, where: Where) -> None:
        if type(value) is not int or not -(1 << 63) <= value < 1 << 64:
            raise SchemaError(f"Parameter '{where.path}' expects uint64")
        if not 0 <= value < 1 << 32:
            raise SchemaError(f"Parameter '{where.name}' expects uint32_t")


class Enum:
    def __init__(self, *values: str) -> None:
        self.values = values

    def check(self, value: Any, where: Where) -> None:
        Str().check(value, where)
        if value not in self.values:
            raise SchemaError(f"Parameter '{where.name}' does not accept value '{value}'")


class ListOf:
    def __init__(self, element: Type) -> None:
        self.element = element

    def check(self, value: Any, where: Where) -> None:
        if not isinstance(value, list):
            raise where.expected("array")
        for index, each in enumerate(value):
            self.element.check(each, where.element(index))


@dataclass(frozen=True)
class Struct:
    """Members that there must be, then those that may be left out."""

    required: Mapping[str, Type] = field(default_factory=dict)
    optional: Mapping[str, Type] = field(default_factory=dict)

    def check(self, value: Any, where: Where) -> None:
        if not isinstance(value, dict):
            raise where.expected("object")
        self.check_members(value, where)
        for name in value:
            if name not in self.required and name not in self.optional:
                raise SchemaError(f"Parameter '{where.member(name).path}' is unexpected")

    def check_members(self, value: dict[str, Any], where: Where) -> None:
        for name, kind in self.required.items():
            if name not in value:
                raise SchemaError(f"Parameter '{where.member(name).path}' is missing")
            kind.check(value[name], where.member(name))
        for name, kind in self.optional.items():
            if name in value:
                kind.check(value[name], where.member(name))


class Union:
    """A struct whose member ``type`` says what its member ``data`` is."""

    def __init__(self, branches: Mapping[str, Type]) -> None:
        self.branches = branches
        self.discriminator = Struct({"type": Enum(*branches)})

    def check(self, value: Any, where: Where) -> None:
        if not isinstance(value, dict):
            raise where.expected("object")
        self.discriminator.check_members(value, where)
        Struct({"data": self.branches[value["type"]], "type": Str()}).check(value, where)


class Alternate:
    """A string, or a struct."""

    def __init__(self, name: str, struct: Struct) -> None:
        self.name = name
        self.struct = struct

    def check(self, value: Any, where: Where) -> None:
        if isinstance(value, dict):
            self.struct.check(value, where)
        elif isinstance(value, str):
            Str().check(value, where)
        else:
            raise SchemaError(f"Invalid parameter type for '{where.name}', expected: {self.name}")


NOTHING = Struct()
BITMAP = Struct({"node": Str(), "name": Str()})
BITMAP_ADD = Struct(
    BITMAP.required, {"granularity": Uint32(), "persistent": Bool(), "disabled": Bool()}
)
BITMAP_MERGE = Struct(
    {"node": Str(), "target": Str(), "bitmaps": ListOf(Alternate("BlockDirtyBitmapOrStr", BITMAP))}
)
#: By name without ``block-dirty-bitmap-``.
BITMAP_COMMANDS = {
    "add": BITMAP_ADD,
    "remove": BITMAP,
    "clear": BITMAP,
    "enable": BITMAP,
    "disable": BITMAP,
    "merge": BITMAP_MERGE,
}
#: Of a transaction, by type.
ACTIONS: dict[str, Type] = {
    "abort": NOTHING,
    **{f"block-dirty-bitmap-{name}": struct for name, struct in BITMAP_COMMANDS.items()},
}
TRANSACTION = Struct(
    {"actions": ListOf(Union(ACTIONS))},
    {"properties": Struct({}, {"completion-mode": Enum("individual", "grouped")})},
)
CAPABILITIES = Struct({}, {"enable": ListOf(Enum("oob"))})
NAMED_BLOCK_NODES = Struct({}, {"flat": Bool()})
MARK = Struct({"node": Str(), "offset": Int(), "length": Int()})
AREAS = Struct(BITMAP.required, {"start": Int(), "limit": Int()})
BITMAPS = Struct({"bitmaps": ListOf(BITMAP)})

# ---- replies; they are right by themselves, and described for query-qmp-schema ----------------

COMMAND_INFOS = ListOf(Struct({"name": Str()}))
VERSION = Struct(
    {"qemu": Struct({"major": Int(), "minor": Int(), "micro": Int()}), "package": Str()}
)
STATUS = Struct({"running": Bool(), "status": Enum("running")})
NAME = Struct({}, {"name": Str()})
SCHEMA_INFOS = ListOf(
    Struct(
        {
            "name": Str(),
            "meta-type": Enum(
                "command", "event", "builtin", "enum", "array", "object", "alternate"
            ),
        },
        {
            "features": ListOf(Str()),
            "arg-type": Str(),
            "ret-type": Str(),
            "json-type": Str(),
            "element-type": Str(),
            "values": ListOf(Str()),
            "members": ListOf(
                Struct(
                    {},
                    {
                        "name": Str(),
                        "type": Str(),
                        "default": Anything(),
                        "features": ListOf(Str()),
                    },
                )
            ),
            "tag": Str(),
            "variants": ListOf(Struct({"case": Str(), "type": Str()})),
        },
    )
)
BITMAP_INFO = Struct(
    {
        "name": Str(),
        "count": Int(),
        "granularity": Int(),
        "recording": Bool(),
        "busy": Bool(),
        "persistent": Bool(),
    },
    {"inconsistent": Bool()},
)
NODE_INFOS = ListOf(
    Struct(
        {
            "node-name": Str(),
            "drv": Str(),
            "ro": Bool(),
            "file": Str(),
            "image": Struct({"filename": Str(), "format": Str(), "virtual-size": Int()}),
        },
        {"dirty-bitmaps": ListOf(BITMAP_INFO)},
    )
)
NO_BLOCK_INFOS = ListOf(NOTHING)
SHA256 = Struct({"sha256": Str()})
AREAS_FOUND = Struct({"areas": ListOf(Struct({"offset": Int(), "length": Int()}))}, {"next": Int()})
