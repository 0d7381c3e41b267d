# SPDX-License-Identifier: MIT
"""QEMU's interface to dirty bitmaps (QMP), on a :class:`pybitmap.BlockGraph`.

``execute`` takes one command as a dict and gives the reply as a dict; a ``Session`` does so for one
client, which can freeze bitmaps; ``serve`` and ``Server`` do so over a unix socket, for the clients
that people have for QEMU. ``transact`` takes a list of
actions as QMP has them, and raises instead of replying. ``bitmap_info`` and ``node_info`` are what
queries list.

>>> from pybitmap import BlockGraph
>>> graph = BlockGraph()
>>> node = graph.add_node("disk", size=1 << 20)
>>> add = {"execute": "block-dirty-bitmap-add", "arguments": {"node": "disk", "name": "b"}}
>>> execute(graph, add)
{'return': {}}
>>> execute(graph, add)
{'error': {'class': 'GenericError', 'desc': 'Bitmap already exists: b'}}
"""

from .commands import Session, bitmap_info, execute, node_info, transact
from .server import Server, serve

__all__ = ["Server", "Session", "bitmap_info", "execute", "node_info", "serve", "transact"]
