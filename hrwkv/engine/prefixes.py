"""Prefixes of earlier requests, kept in host memory: a request that begins like one reads only the rest.

A linear layer has no memory of single tokens, only a state that holds at one position. So a prefix can be
continued where it was kept and nowhere before. What a request shares beyond that, up to a ``fork``, it reads
once more and keeps too: a common system prompt, or the part of a conversation that a chat template does not
write anew.

They lie in a radix tree over token ids (as SGLang's, arXiv 2312.07104), compared token by token: no hash can
make two texts one. Those that begin alike share pages of keys and values. The least recently used goes out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hrwkv.engine.memory import Memory, Saved

# Tokens that must be saved by it before a prefix is kept: to copy a state costs as much as reading some.
MIN_GAIN = 32


@dataclass(frozen=True)
class Found:
    """What is known of a prompt's beginning.

    saved: the longest kept prefix of it, of ``length`` tokens; None and 0 if there is none. fork: where it
    leaves what else is known, if that is worth keeping.
    """

    saved: Saved | None = None
    length: int = 0
    fork: int | None = None


@dataclass(eq=False)
class _Node:
    """A beginning of kept prefixes: ``length`` tokens, of which ``edge`` [n] int32 follow the parent's."""

    edge: np.ndarray
    length: int
    parent: _Node | None
    children: dict[int, _Node] = field(default_factory=dict)
    saved: Saved | None = None


class Prefixes:
    """The kept prefixes of one ``memory``, as many as its pages hold; ``min_gain``: see ``MIN_GAIN``."""

    def __init__(self, memory: Memory, *, min_gain: int = MIN_GAIN) -> None:
        self._memory, self._min_gain = memory, min_gain
        self._root = _Node(np.empty(0, dtype=np.int32), 0, None)
        self._nodes: OrderedDict[Saved, _Node] = OrderedDict()  # the least recently used first

    def __len__(self) -> int:
        return len(self._nodes)

    def find(self, tokens: Sequence[int]) -> Found:
        """The longest kept prefix of these tokens, which counts as used."""
        if not self._nodes:
            return Found()
        path, common = self._walk(_array(tokens))
        node = _deepest(path)
        if node.saved is not None and node.children:
            # Continued once, it is a conversation, whose next prefix takes its place; again, it is shared.
            self._nodes.move_to_end(node.saved)
        is_worth_it = common - node.length >= self._min_gain
        return Found(node.saved, node.length, common if is_worth_it else None)

    def keep(self, tokens: Sequence[int]) -> tuple[Saved, int] | None:
        """Pages for a prefix, and how many blocks they hold already, being those of a shorter one.

        None if it gains too little, or finds no room: what a step that is not read yet copies has to stay.
        """
        memory = self._memory
        if memory.pages_for(len(tokens)) > memory.kept.total:
            return None
        array = _array(tokens)
        below = _deepest(self._walk(array)[0])
        if len(array) - below.length < self._min_gain:
            return None
        shared = [] if below.saved is None else below.saved.blocks[: below.length // memory.sizes.block_size]
        memory.kept.share(shared)
        num_new = memory.pages_for(len(array)) - len(shared)
        if not self._make_room(num_new):
            memory.kept.release(shared)
            return None
        new = memory.kept.take(num_new)
        states = memory.sizes.state_pages
        saved = Saved(new[:states], [*shared, *new[states:]])
        node = self._insert(array)
        node.saved, self._nodes[saved] = saved, node
        return saved, len(shared)

    def drop(self, saved: Saved) -> None:
        """Give a prefix's pages back; nothing if it is not kept."""
        if (node := self._nodes.pop(saved, None)) is not None:
            self._memory.kept.release(saved.pages)
            node.saved = None
            self._prune(node)

    def drop_uncertain(self) -> None:
        """A step failed: drop what it, or one that is not read, should have copied."""
        for saved in [saved for saved in self._nodes if not saved.is_certain]:
            self.drop(saved)

    def _make_room(self, count: int) -> bool:
        while self._memory.kept.free < count:
            oldest = next((saved for saved in self._nodes if saved.is_certain), None)
            if oldest is None:
                return False
            self.drop(oldest)
        return True

    def _walk(self, tokens: np.ndarray) -> tuple[list[_Node], int]:
        """The nodes that begin these tokens, and how many of the tokens any prefix begins with."""
        path, place = [self._root], 0
        while place < len(tokens):
            child = path[-1].children.get(int(tokens[place]))
            if child is None:
                break
            same = _num_equal(child.edge, tokens[place:])
            place += same
            if same < len(child.edge):
                break
            path.append(child)
        return path, place

    def _insert(self, tokens: np.ndarray) -> _Node:
        """The node of these tokens, made where there is none."""
        path, common = self._walk(tokens)
        node = path[-1]
        if common > node.length:  # in the middle of an edge
            node = self._split(node.children[int(tokens[node.length])], common)
        if common == len(tokens):
            return node
        child = _Node(tokens[common:].copy(), len(tokens), node)
        node.children[int(tokens[common])] = child
        return child

    def _split(self, node: _Node, length: int) -> _Node:
        """A new node on the edge to ``node``."""
        parent, cut = node.parent, len(node.edge) - (node.length - length)
        assert parent is not None
        middle = _Node(node.edge[:cut], length, parent, {int(node.edge[cut]): node})
        parent.children[int(node.edge[0])] = middle
        node.edge, node.parent = node.edge[cut:], middle
        return middle

    def _prune(self, node: _Node) -> None:
        """Take out a node that neither holds a prefix nor parts any, and so on upwards."""
        while (parent := node.parent) is not None and node.saved is None and len(node.children) < 2:
            first = int(node.edge[0])
            if not node.children:
                del parent.children[first]
            for child in node.children.values():
                child.edge, child.parent = np.concatenate([node.edge, child.edge]), parent
                parent.children[first] = child
            node = parent


def _array(tokens: Sequence[int]) -> np.ndarray:
    return np.fromiter(tokens, dtype=np.int32, count=len(tokens))


def _deepest(path: Sequence[_Node]) -> _Node:
    """The last node with a prefix; the root, which has none, without one."""
    return next((node for node in reversed(path) if node.saved is not None), path[0])


def _num_equal(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens both begin with."""
    size = min(len(first), len(second))
    differs = first[:size] != second[:size]
    return int(differs.argmax()) if differs.any() else size
