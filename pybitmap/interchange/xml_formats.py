# SPDX-License-Identifier: MIT
"""The XML of thin-provisioning-tools: thin_delta, era_invalidate, era_dump.

Read piece by piece, by expat. Document types are refused, and with them all entities of a text's
own; elements that are nested deeper than these tools do, and tokens of more than MAX_TOKEN bytes,
are refused as well.

Source: thin_delta(8), era_invalidate(8), era_dump(8), and what their versions 0.9 print
(https://github.com/jthornber/thin-provisioning-tools). They count the size of blocks in sectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NoReturn
from xml.parsers import expat

from ..errors import FormatError
from ..extent import Extent
from .base import (
    SECTOR,
    Format,
    Malformed,
    Options,
    Order,
    Output,
    Source,
    batched,
    number,
    shown,
)

MAX_TOKEN = 1 << 20  # bytes that expat may keep of a token that has not ended
_CHUNK = 1 << 16
_DEEPEST = 6

_SAME, _DIFFERENT = "same", ("different", "left_only", "right_only")


class _Elements:
    """Begins of elements, with their attributes: ``found(path, attributes)`` is called for each.

    What it gives is taken by :meth:`run`.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._path: list[str] = []
        self.extents: list[Extent] = []
        self._parser = parser = expat.ParserCreate()
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text
        parser.StartDoctypeDeclHandler = self._doctype
        parser.EntityDeclHandler = self._doctype

    def found(self, path: list[str], attributes: Mapping[str, str]) -> None:
        raise NotImplementedError

    def run(self) -> Iterator[Extent]:
        parser, fed = self._parser, 0
        while True:
            chunk = self._source.read(_CHUNK)
            fed += len(chunk)
            try:
                parser.Parse(chunk, not chunk)
            except expat.ExpatError as error:
                why = expat.ErrorString(error.code)
                self._source.refuse(f"no XML: {why}", line=error.lineno)
            except Malformed as error:
                self._refuse(str(error))
            except (LookupError, ValueError) as error:  # an encoding that there is not
                self._refuse(f"no XML: {error}")
            yield from self.extents
            self.extents.clear()
            if not chunk:
                return
            if fed - max(0, parser.CurrentByteIndex) > MAX_TOKEN:
                self._refuse(f"something of more than {MAX_TOKEN} bytes that does not end")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._path.append(name)
        if len(self._path) > _DEEPEST:
            raise Malformed(f"elements within elements, more than {_DEEPEST} deep")
        self.found(self._path, attributes)

    def _end(self, name: str) -> None:
        self._path.pop()

    def _text(self, text: str) -> None:
        if not text.isspace():
            raise Malformed(f"text, {shown(text)}, where only elements should be")

    def _doctype(self, *arguments: object) -> None:
        raise Malformed("a document type, or an entity: these tools write none, so it is refused")

    def _refuse(self, why: str) -> NoReturn:
        self._source.refuse(why, line=self._parser.CurrentLineNumber)


def _whole(attributes: Mapping[str, str], key: str) -> int:
    if key not in attributes:
        raise Malformed(f"an element without {key}")
    return number(attributes[key].strip(), f"{key}, a whole number,")


def _unknown(path: list[str]) -> Malformed:
    return Malformed(f"element {shown('/'.join(path))}, which is not known")


def _with_block_size(options: Options, sectors: int) -> Options:
    """As the text has it.

    :raises Malformed: if it cannot be
    """
    nbytes = sectors * SECTOR
    if not 0 < nbytes < 1 << 62:
        raise Malformed(f"blocks of {sectors} sectors")
    return replace(options, block_size=nbytes)


# ---- thin_delta -----------------------------------------------------------------------------


class _ThinDelta(_Elements):
    def __init__(self, source: Source, options: Options) -> None:
        super().__init__(source)
        self._options = options
        self._order: Order | None = None

    def found(self, path: list[str], attributes: Mapping[str, str]) -> None:
        if path == ["superblock"]:
            sectors = _whole(attributes, "data_block_size")
            self._order = Order(_with_block_size(self._options, sectors))
        elif path == ["superblock", "diff"]:
            pass
        elif path[:2] == ["superblock", "diff"] and path[2] in (_SAME, *_DIFFERENT):
            if len(path) > 4 or path[3:] not in ([], ["range"]):
                raise _unknown(path)
            if len(path) == 3 and not attributes:
                return  # of --verbose: its ranges come
            assert self._order is not None
            first, count = _whole(attributes, "begin"), _whole(attributes, "length")
            self.extents.append(self._order.blocks(first, count, path[2] != _SAME))
        else:
            raise _unknown(path)


def read_thin_delta(source: Source, options: Options) -> Iterator[Extent]:
    """``thin_delta``, with --verbose or without: what is not the same is dirty, also what only one
    of the two has. Blocks have the size that it says, ``data_block_size`` in sectors."""
    return _ThinDelta(source, options).run()


def write_thin_delta(extents: Iterable[Extent], out: Output, options: Options) -> None:
    block_size = options.blocks("thin-delta counts blocks")
    if block_size % SECTOR:
        raise FormatError(f"thin-delta: blocks of {block_size} bytes are no whole sectors of 512")
    blocks = -(-(options.size or 0) // block_size)

    def lines() -> Iterator[str]:
        yield (
            f'<superblock uuid="" time="0" transaction="0" data_block_size="{block_size // SECTOR}"'
            f' nr_data_blocks="{blocks}">\n  <diff left="0" right="1">\n'
        )
        for start, length, dirty in extents:
            name = "different" if dirty else _SAME
            count = -(-length // block_size)
            yield f'    <{name} begin="{start // block_size}" length="{count}"/>\n'
        yield "  </diff>\n</superblock>\n"

    batched(lines(), out)


# ---- era_invalidate -------------------------------------------------------------------------


class _Era(_Elements):
    def __init__(self, source: Source, options: Options) -> None:
        super().__init__(source)
        options.blocks("era counts blocks of the size that the device was made with")
        self._order = Order(options)

    def found(self, path: list[str], attributes: Mapping[str, str]) -> None:
        if path == ["blocks", "block"]:
            self.extents.append(self._order.blocks(_whole(attributes, "block"), 1))
        elif path == ["blocks", "range"]:
            first, end = _whole(attributes, "begin"), _whole(attributes, "end")
            if end < first:
                raise Malformed(f"a range from block {first} to {end}")
            self.extents.append(self._order.blocks(first, end - first))
        elif path != ["blocks"]:
            raise _unknown(path)


def read_era(source: Source, options: Options) -> Iterator[Extent]:
    """``era_invalidate --written-since``: blocks, and ranges of them up to an ``end`` that is not
    in them. Their size is not in it."""
    return _Era(source, options).run()


def write_era(extents: Iterable[Extent], out: Output, options: Options) -> None:
    block_size = options.blocks("era counts blocks")

    def lines() -> Iterator[str]:
        yield "<blocks>\n"
        for start, length, _ in extents:
            first, count = start // block_size, -(-length // block_size)
            if count == 1:
                yield f'  <block block="{first}"/>\n'
            else:
                yield f'  <range begin="{first}" end = "{first + count}"/>\n'
        yield "</blocks>\n"

    batched(lines(), out)


# ---- era_dump -------------------------------------------------------------------------------


class _EraDump(_Elements):
    def __init__(self, source: Source, options: Options, since: int) -> None:
        super().__init__(source)
        self._options, self._since = replace(options, any_order=True), since
        self._order: Order | None = None
        self._era = 0  # of the writeset
        self._sets = False  # there are such
        self._blocks = 0
        self._next = -1  # the block that would go on the last extent

    def found(self, path: list[str], attributes: Mapping[str, str]) -> None:
        if path == ["superblock"]:
            options = _with_block_size(self._options, _whole(attributes, "block_size"))
            self._order = Order(options)
            self._blocks = _whole(attributes, "nr_blocks")
            self.extents.append(self._order.blocks(self._blocks, 0))
        elif path == ["superblock", "writeset"]:
            self._era, self._sets = _whole(attributes, "era"), True
        elif path == ["superblock", "writeset", "bit"]:
            value = attributes.get("value")
            if value not in ("true", "false"):
                raise Malformed(f"a bit that is {shown(value)}, neither true nor false")
            self._block(attributes, self._era if value == "true" else -1)
        elif path == ["superblock", "era_array", "era"]:
            era = _whole(attributes, "era")
            if 0 < era < self._since and not self._sets:
                raise Malformed(
                    f"block {_whole(attributes, 'block')} was written in era {era}, and perhaps"
                    " later: without sets of writes, as of era_dump --logical, the first of several"
                    " eras may be told. Take era_dump without it, or era_invalidate"
                )
            self._block(attributes, era)
        elif path != ["superblock", "era_array"]:
            raise _unknown(path)

    def _block(self, attributes: Mapping[str, str], era: int) -> None:
        block = _whole(attributes, "block")
        if block >= self._blocks:
            raise Malformed(f"block {block}, where there are {self._blocks}")
        if era < self._since:
            return
        assert self._order is not None
        extent = self._order.blocks(block, 1)
        if block == self._next and self.extents:
            before = self.extents.pop()
            extent = Extent(before.start, extent.end - before.start)
        self.extents.append(extent)
        self._next = block + 1


def read_era_dump(source: Source, options: Options) -> Iterator[Extent]:
    """``era_dump``: blocks that were written in an era from ``since`` on, by the array of eras or
    by a set of writes that is not in there yet. (The first is what ``era_invalidate
    --written-since`` takes.) With --logical, version 0.9 tells of a block that is in several of
    these sets the first era, so a dump without sets is refused where that would matter."""
    if options.since is None:
        raise FormatError("era-dump: say from which era on blocks count, by since (--since)")
    return _EraDump(source, options, options.since).run()


FORMATS = (
    Format(
        "thin-delta",
        "thin_delta's XML",
        "",
        read_thin_delta,
        write_thin_delta,
        whole=True,
        blocks=True,
    ),
    Format("era", "era_invalidate's XML", "", read_era, write_era, blocks=True),
    Format("era-dump", "era_dump's XML (to read)", "", read_era_dump),
)
