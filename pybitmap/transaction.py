# SPDX-License-Identifier: MIT
"""Transactions: several changes of named bitmaps, all or none of them.

Guest writes run on meanwhile, so what an action prepares never touches live bits nor what records:

=========  ==========================================  =========================  ==================
action     prepare                                     commit                     abort
=========  ==========================================  =========================  ==================
add        the bitmap is there and records             --                         it goes
remove     busy, and not to be stored: the name stays  it goes                    takes the two back
clear      an empty shadow records beside it           the shadow is the content  drops the shadow
merge      a shadow with the old content, and the      the shadow is the content  drops the shadow
           sources' content
enable,    the flag, for later actions and queries     it records, or does not    takes the flag
disable                                                                           back
=========  ==========================================  =========================  ==================

A bitmap that is to be removed keeps its name until the commit, so an abort has no name to give back
that somebody else might have taken. Commit publishes once per node what records then. All that can
fail, memory for that included, comes before the first change that cannot be taken back.

Persistent bitmaps: shadows are made by the store. The commit prepares the stores, switches them,
and only then changes what is in memory, which cannot fail. It is atomic within one store and
ordered across stores: see :class:`pybitmap.store.base.Switches`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Callable, Union, cast

from .dirty import CHANGE, REMOVAL, USE, DirtyBitmap, Host
from .errors import AbortedError, InvalidError, NotFoundError
from .hbitmap import HBitmap
from .store.base import Purpose, Switches, Volume, Wanted

if TYPE_CHECKING:
    from .node import BlockGraph, BlockNode

#: A bitmap to merge from: its name, on the node of the target, or (node, name).
Source = Union[str, "tuple[str, str]"]


class Transaction:
    """The actions of a block ``with graph.transaction() as tx``; nodes and bitmaps by name.

    Every action raises what the same change would raise outside, and aborts everything by it.
    """

    def __init__(self, graph: BlockGraph) -> None:
        self._graph = graph
        self._undo: list[Callable[[], object]] = []
        self._nodes: dict[str, BlockNode] = {}  # whose bitmaps something was prepared for
        self._aborted = False

    # ---- actions ----------------------------------------------------------------------------

    def add(
        self,
        node: str,
        name: str,
        granularity: int | None = None,
        *,
        persistent: bool = False,
        disabled: bool = False,
    ) -> DirtyBitmap:
        """See :meth:`BlockNode.add_bitmap`; it records from now on."""
        with self._action():
            if not name:  # before the node is looked up, as in QEMU
                raise InvalidError("Bitmap name cannot be empty")
            if node not in self._graph.nodes:
                raise NotFoundError(f"Cannot find device='{node}' nor node-name='{node}'")
            host = self._graph.find_node(node)
            return self._add(host, name, granularity, persistent=persistent, disabled=disabled)

    def _add(
        self,
        host: BlockNode,
        name: str,
        granularity: int | None,
        *,
        persistent: bool,
        disabled: bool,
    ) -> DirtyBitmap:
        with self._action():
            self._touch(host)
            bitmap = host._add(name, granularity, persistent=persistent, disabled=disabled)
            self._undo.append(lambda: host._forget(bitmap))
            host.publish()
            return bitmap

    def remove(self, node: str, name: str) -> None:
        """Until the commit the bitmap keeps its name, is busy, and is not stored."""
        with self._action():
            self._remove(self._find(node, name))

    def _remove(self, bitmap: DirtyBitmap) -> None:
        with self._action():
            bitmap.check(REMOVAL)
            self._touch(bitmap._host)
            skip_store = bitmap._skip_store

            def mark(going: bool) -> None:
                bitmap._busy = bitmap._gone_then = going
                bitmap._skip_store = going or skip_store

            self._undo.append(lambda: mark(False))
            mark(True)

    def clear(self, node: str, name: str) -> None:
        """See :meth:`DirtyBitmap.clear`."""
        with self._action():
            self._clear(self._find(node, name))

    def _clear(self, bitmap: DirtyBitmap) -> None:
        with self._action():
            bitmap.check(CHANGE)
            if bitmap._shadow is None:
                self._add_shadow(bitmap)
            else:
                bitmap._shadow.reset_all()

    def merge(self, node: str, target: str, sources: Iterable[Source]) -> None:
        """See :meth:`DirtyBitmap.merge`."""
        with self._action():
            # One by one: QEMU looks up a source when those before it have been judged.
            found = (
                self._find(node, source) if isinstance(source, str) else self._find(*source)
                for source in sources
            )
            self._merge(self._find(node, target), found)

    def _merge(self, bitmap: DirtyBitmap, sources: Iterable[DirtyBitmap]) -> None:
        with self._action():
            gathered = bitmap._gather(sources)
            if bitmap._shadow is None:
                # Published before the old content is copied, so no write falls between.
                self._add_shadow(bitmap).merge(bitmap._bitmap)
            bitmap._prepared_content().merge(gathered)

    def enable(self, node: str, name: str) -> None:
        """See :meth:`DirtyBitmap.enable`; it records from the commit on."""
        with self._action():
            self._enable(self._find(node, name), True)

    def disable(self, node: str, name: str) -> None:
        """See :meth:`DirtyBitmap.disable`; it records until the commit."""
        with self._action():
            self._enable(self._find(node, name), False)

    def _enable(self, bitmap: DirtyBitmap, enabled: bool) -> None:
        with self._action():
            bitmap.check(USE)
            self._touch(bitmap._host)
            before = bitmap._enabled_then
            self._undo.append(lambda: setattr(bitmap, "_enabled_then", before))
            bitmap._enabled_then = enabled

    def abort(self) -> None:
        """Always fails: for tests.

        :raises AbortedError: always
        """
        with self._action():
            raise AbortedError("Transaction aborted using Abort action")

    # ---- prepare ----------------------------------------------------------------------------

    def _action(self) -> _Action:
        if self._aborted:
            raise AbortedError("the transaction was aborted by an action that failed")
        return _Action(self)

    def _find(self, node: str, name: str) -> DirtyBitmap:
        return self._graph.find_node(node).find_bitmap(name)

    def _touch(self, host: Host) -> None:
        """Something is to be prepared for a bitmap of that node."""
        node = cast("BlockNode", host)
        self._nodes[node.name] = node

    def _add_shadow(self, bitmap: DirtyBitmap) -> HBitmap:
        """An empty one, which has every write from now on if the bitmap records."""
        shadow = bitmap._new_content()
        self._touch(bitmap._host)
        self._undo.append(lambda: setattr(bitmap, "_shadow", None))
        bitmap._shadow = shadow
        bitmap._host.publish()
        return shadow

    # ---- the end ----------------------------------------------------------------------------

    def _commit(self) -> Exception | None:
        """
        :returns: what a store has still to be told although others were, and why; None: nothing
        """
        if self._aborted:
            raise AbortedError("the transaction was aborted by an action that failed")
        wanted = self._wanted()
        prepared = []
        try:
            for node in self._nodes.values():
                prepared.append((node, node._prepare(node.size, then=True)))
            failed = Switches(wanted, Purpose.COMMIT).switch()
        except BaseException:
            for volume in wanted:  # an interruption may have come behind the switch
                volume.pending = True
            for node, each in prepared:
                node._discard(each)
            raise
        self._undo.clear()
        self._nodes.clear()
        for node, each in prepared:
            node._commit(each)
        return failed

    def _wanted(self) -> dict[Volume, Wanted]:
        """What the stores are to hold after the commit."""
        wanted = {}
        for node in self._nodes.values():
            if node._volume is not None and not node.read_only:
                then = node._wanted(then=True)
                if not then.same(node._wanted()):
                    wanted[node._volume] = then
        # And what a store could not be told before.
        stores = {volume.store for volume in wanted}
        for node in self._graph.nodes.values():
            volume = node._volume
            if node._closed or volume is None:
                continue
            if volume.pending and volume.store in stores:
                wanted.setdefault(volume, node._wanted(then=True))
        return wanted

    def _abort(self) -> None:
        """Takes back what was prepared, the last action first; may be called twice."""
        self._aborted = True
        while self._undo:
            self._undo.pop()()
        for node in self._nodes.values():
            node._withdraw()
        self._nodes.clear()


class _Action:
    """One action: if it fails, the transaction is aborted before anybody can go on."""

    def __init__(self, transaction: Transaction) -> None:
        self._transaction = transaction

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._transaction._abort()
