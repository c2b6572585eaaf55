"""YAML of a configuration, read with suspicion: no document may cost more to read than it has bytes."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from trainer.errors import UserError

# Far more than any configuration has. Counted with every alias written out, which is what reading one costs.
MAX_BYTES, MAX_DEPTH, MAX_VALUES = 1 << 20, 20, 100_000


def read_yaml(text: str, where: str) -> Any:
    """The value of a YAML document; None for an empty one. `where` names it in errors.

    Raises UserError, one line: no YAML, a key that stands twice in one mapping (the last would win silently), an anchor
    that contains itself, a document that is too deep or too large.
    """
    if len(text) > MAX_BYTES:
        raise UserError(f"{where} is larger than {MAX_BYTES} bytes; it is no configuration")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check(node, where, {}, ())
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError as error:
        raise UserError(f"{where} is nested more than {MAX_DEPTH} deep") from error
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
    ) as error:  # the latter: values of odd tags
        raise UserError(f"{where} is not YAML ({' '.join(str(error).split()):.300})") from error


class _Loader(yaml.SafeLoader):
    """YAML with the booleans of version 1.2, true and false alone: `off` is a word (tracking.uri=off)."""


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")
)


def _check(node: yaml.Node, where: str, sizes: dict[int, int], above: tuple[int, ...]) -> int:
    """Values below a node, each alias written out.

    Raises UserError. `sizes`: of nodes that were seen; `above`: those around this one.
    """
    line = node.start_mark.line + 1
    if id(node) in above:
        raise UserError(f"{where}: the anchor in line {line} contains itself")
    if len(above) > MAX_DEPTH:
        raise UserError(f"{where} is nested more than {MAX_DEPTH} deep in line {line}")
    if id(node) in sizes:
        return sizes[id(node)]
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        seen: set[Hashable] = set()
        for key, value in node.value:
            inner += [key, value]
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                raise UserError(
                    f"{where}: {key.value!r} stands twice, again in line {key.start_mark.line + 1}; write it once"
                )
            seen.add(name)
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    size = 1 + sum(_check(value, where, sizes, (*above, id(node))) for value in inner)
    if size > MAX_VALUES:
        raise UserError(f"{where} has more than {MAX_VALUES} values, aliases written out; it is no configuration")
    sizes[id(node)] = size
    return size
