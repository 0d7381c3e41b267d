# SPDX-License-Identifier: MIT
"""What ``query-qmp-schema`` answers: the types of schema.py as a list of SchemaInfo.

Source: "QMP introspection" and "Client JSON Protocol introspection" of QEMU's QAPI documents. A
type is named once, however many have it; names of those that are not built in mean nothing and may
be others in the next version, as with QEMU.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from .schema import Alternate, Anything, Bool, Enum, Int, ListOf, Str, Struct, Type, Uint32, Union

_BUILTIN: dict[type, tuple[str, str]] = {
    Str: ("str", "string"),
    Int: ("int", "int"),
    Uint32: ("int", "int"),
    Bool: ("bool", "boolean"),
    Anything: ("any", "value"),
}


def schema_info(commands: Iterable[tuple[str, Struct, Type]]) -> list[dict[str, Any]]:
    """Commands first, then the types that they need.

    :param commands: the name of each, its arguments, and what it returns
    """
    types = _Types()
    infos = []
    for name, arguments, returns in commands:
        info: dict[str, Any] = {
            "name": name,
            "meta-type": "command",
            "arg-type": types.name(arguments),
            "ret-type": types.name(returns),
        }
        if name.startswith("x-"):
            info["features"] = ["unstable"]
        infos.append(info)
    return infos + list(types.infos.values())


class _Types:
    """Types that have got a name, by what they are."""

    def __init__(self) -> None:
        self.infos: dict[str, dict[str, Any]] = {}

    def name(self, kind: Type) -> str:
        for builtin, (name, json_type) in _BUILTIN.items():
            if isinstance(kind, builtin):
                return self._named(name, {"meta-type": "builtin", "json-type": json_type})
        if isinstance(kind, ListOf):
            element = self.name(kind.element)
            return self._named(f"[{element}]", {"meta-type": "array", "element-type": element})
        made = self._made(kind)
        return self._named(str(len(self.infos)), made)

    def _named(self, name: str, info: dict[str, Any]) -> str:
        known = self.infos.setdefault(json.dumps(info), {"name": name, **info})
        return str(known["name"])

    def _made(self, kind: Type) -> dict[str, Any]:
        if isinstance(kind, Enum):
            members = [{"name": value} for value in kind.values]
            return {"meta-type": "enum", "members": members, "values": list(kind.values)}
        if isinstance(kind, Alternate):
            types = (Str(), kind.struct)
            return {"meta-type": "alternate", "members": [{"type": self.name(t)} for t in types]}
        if isinstance(kind, Union):
            return {
                "meta-type": "object",
                "members": self._members(kind.discriminator),
                "tag": "type",
                "variants": [
                    {"case": case, "type": self.name(Struct({"data": branch}))}
                    for case, branch in kind.branches.items()
                ],
            }
        assert isinstance(kind, Struct), kind
        return {"meta-type": "object", "members": self._members(kind)}

    def _members(self, struct: Struct) -> list[dict[str, Any]]:
        return [
            *({"name": name, "type": self.name(kind)} for name, kind in struct.required.items()),
            *(
                {"name": name, "type": self.name(kind), "default": None}
                for name, kind in struct.optional.items()
            ),
        ]
