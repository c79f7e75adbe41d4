"""Graphs as the web page saves them (UI format 0.4) to prompts as the server takes them."""

from __future__ import annotations

from typing import Any

#: Nodes that exist on the page alone.
PAGE_ONLY = {"Note", "MarkdownNote", "Reroute", "PrimitiveNode"}
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}

Graph = dict[str, Any]
Prompt = dict[str, dict[str, Any]]


def input_specs(info: dict[str, Any]) -> dict[str, tuple[Any, dict[str, Any]]]:
    """A node's inputs as `{name: (type, options)}` in the order of the page: required, then optional."""
    groups = [info["input"].get(group, {}) for group in ("required", "optional")]
    return {
        name: (spec[0], spec[1] if len(spec) > 1 else {})
        for group in groups
        for name, spec in group.items()
        if isinstance(spec, list)
    }


def is_widget(kind: Any, options: dict[str, Any]) -> bool:
    """Whether an input is set on the node itself; a list is the older way to write a combo."""
    return (isinstance(kind, list) or kind in WIDGETS) and not options.get("forceInput", False)


def has_control(name: str, kind: Any, options: dict[str, Any]) -> bool:
    """Whether the page saves one more value, of what happens to a seed after a run."""
    return kind == "INT" and bool(options.get("control_after_generate", name in ("seed", "noise_seed")))


def widget_values(node: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """A node's saved values by name. Raises ValueError where there are not as many as the server's node has."""
    saved = node.get("widgets_values", [])
    if isinstance(saved, dict):
        return dict(saved)
    values, place = dict[str, Any](), 0
    for name, (kind, options) in input_specs(info).items():
        if not is_widget(kind, options):
            continue
        if place >= len(saved):
            raise ValueError(f"{node['type']} has {len(saved)} saved values: expected one for {name} too")
        values[name] = saved[place]
        place += 1 + has_control(name, kind, options)
    if place != len(saved):
        raise ValueError(f"{node['type']} has {len(saved)} saved values: expected {place}")
    return values


def source(graph: Graph, link_id: int) -> list[Any]:
    """`[node id, slot]` that a link comes from, through reroutes."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = {link[0]: link for link in graph["links"]}
    _, origin, slot, *_ = links[link_id]
    if nodes[origin]["type"] == "Reroute":
        return source(graph, nodes[origin]["inputs"][0]["link"])
    return [str(origin), slot]


def to_prompt(graph: Graph, object_info: dict[str, Any]) -> Prompt:
    """The prompt of a graph. Raises KeyError for a node that the server does not have."""
    prompt: Prompt = {}
    for node in graph["nodes"]:
        if node["type"] in PAGE_ONLY:
            continue
        info = object_info[node["type"]]
        inputs = widget_values(node, info)
        for socket in node.get("inputs", []):
            if socket.get("link") is not None:
                inputs[socket["name"]] = source(graph, socket["link"])
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def of_type(prompt: Prompt, kind: str) -> list[str]:
    """Ids of the nodes of a type."""
    return [key for key, node in prompt.items() if node["class_type"] == kind]


def override(prompt: Prompt, kind: str | None = None, **values: Any) -> Prompt:
    """The prompt with widgets of these names set, in nodes of a type or in all, wherever one is not linked."""
    changed: Prompt = {}
    for key, node in prompt.items():
        inputs = dict(node["inputs"])
        for name, value in values.items():
            if kind in (None, node["class_type"]) and name in inputs and not isinstance(inputs[name], list):
                inputs[name] = value
        changed[key] = {**node, "inputs": inputs}
    return changed
