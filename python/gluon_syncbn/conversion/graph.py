"""A symbol as objects that can be edited: read from its JSON, and written back to a new symbol.

MXNet has no way to replace a node of a symbol.  Its JSON lists nodes by number; here a node knows
its inputs, so one can replace another, and nodes are numbered again when the symbol is written.
"""

import json
import re

from mxnet import symbol

from ..numpy_arrays import like


def _dumps(content):
    """Write JSON with the escapes that MXNet can read: \\", \\\\, \\n, \\r, \\t."""

    def known(match):
        return match[0] if match[1] in '"\\nrt' else json.loads(f'"{match[0]}"')

    return re.sub(r"\\(u....|.)", known, json.dumps(content, ensure_ascii=False))


class Node:
    """An operator or a variable (``op`` is then "null"), and the (node, output) pairs it reads."""

    def __init__(self, op, name, attrs=None, inputs=(), more=None):
        self.op, self.name = op, name
        self.attrs = dict(attrs or {})
        self.inputs = list(inputs)
        self._more = dict(more or {})  # the rest of its JSON entry, such as subgraphs

    @property
    def is_variable(self):
        return self.op == "null"

    @property
    def user_attrs(self):
        """Attributes that are no parameters of the operator, such as ``__ctx_group__``."""
        return {k: v for k, v in self.attrs.items() if k.startswith("__")}

    def flag(self, name, default):
        """A boolean parameter of the operator, with the operator's default."""
        return self.attrs.get(name, str(default)).lower() in ("true", "1")

    def inside(self):
        """The nodes in the bodies of a control flow operator, without what they read."""
        pending, found = list(self._more.get("subgraphs", ())), []
        while pending:
            for entry in pending.pop()["nodes"]:
                found.append(Node(entry["op"], entry["name"], entry.get("attrs")))
                pending.extend(entry.get("subgraphs", ()))
        return found

    def operators_inside(self):
        """Names of the operators in the bodies of a control flow operator."""
        return {node.op for node in self.inside()}


class Graph:
    """A symbol's nodes, inputs before the nodes that read them.

    Parameters
    ----------
    sym : Symbol
    remove_amp_cast : bool, default False
        Leave out the casts of ``mxnet.contrib.amp``.
    """

    def __init__(self, sym, remove_amp_cast=False):
        self._source = sym
        # MXNet writes control characters in names as they are, which JSON does not allow.
        content = json.loads(sym.tojson(remove_amp_cast=remove_amp_cast), strict=False)
        nodes = []
        for entry in content["nodes"]:
            more = {k: v for k, v in entry.items() if k not in ("op", "name", "attrs", "inputs")}
            inputs = [(nodes[i], output) for i, output, *_ in entry["inputs"]]
            nodes.append(Node(entry["op"], entry["name"], entry.get("attrs"), inputs, more))
        self.heads = [(nodes[i], output) for i, output, *_ in content["heads"]]
        self._attrs = content.get("attrs", {})

    @property
    def nodes(self):
        """The nodes that the heads need, in an order in which they can be computed."""
        done, order = set(), []
        # By hand: networks are deeper than Python's stack.
        for head, _ in self.heads:
            stack = [(head, iter(head.inputs))]
            while stack:
                node, inputs = stack[-1]
                if id(node) in done:
                    stack.pop()
                    continue
                following = next((i for i, _ in inputs if id(i) not in done), None)
                if following is None:
                    done.add(id(node))
                    order.append(node)
                    stack.pop()
                else:
                    stack.append((following, iter(following.inputs)))
        return order

    def uses(self):
        """Map the id of each node to its readers: [(reader, or None for a head, output)]."""
        found = {}
        for node in self.nodes:
            for source, output in node.inputs:
                found.setdefault(id(source), []).append((node, output))
        for source, output in self.heads:
            found.setdefault(id(source), []).append((None, output))
        return found

    def replace(self, new):
        """Replace nodes by others, output for output, wherever they are read.

        Parameters
        ----------
        new : dict of Node to Node
        """
        by_id = {id(old): node for old, node in new.items()}

        def now(entry):
            node, output = entry
            while id(node) in by_id:
                node = by_id[id(node)]
            return node, output

        self.heads = [now(entry) for entry in self.heads]
        pending, done = [node for node, _ in self.heads], set()
        while pending:
            node = pending.pop()
            if id(node) not in done:
                done.add(id(node))
                node.inputs = [now(entry) for entry in node.inputs]
                pending.extend(source for source, _ in node.inputs)

    def symbol(self):
        """The graph as a new Symbol, of the kind of the first one: mx.sym or mx.np."""
        nodes = self.nodes
        number = {id(node): i for i, node in enumerate(nodes)}
        entries, rows = [], [0]
        for node in nodes:
            entry = {
                **node._more,
                "op": node.op,
                "name": node.name,
                "inputs": [[number[id(i)], output, 0] for i, output in node.inputs],
            }
            if node.attrs:
                entry["attrs"] = {k: str(v) for k, v in node.attrs.items()}
            entries.append(entry)
            rows.append(rows[-1] + 1)
        content = {
            "nodes": entries,
            "arg_nodes": [i for i, node in enumerate(nodes) if node.is_variable],
            "node_row_ptr": rows,
            "heads": [[number[id(n)], output, 0] for n, output in self.heads],
            "attrs": self._attrs,
        }
        return like(symbol.load_json(_dumps(content)), self._source)
