"""Reads ComfyUI graphs, from the first sampler upwards. Nodes are treated as data: nothing is run or opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sfumato.metadata.names import names
from sfumato.metadata.told import Told
from sfumato.request import GenerateRequest, Noise

__all__ = ["COMFYUI_BASE", "parse"]

# Initial noise is from torch on the CPU, step noise from CUDA, and prompts are weighted against an empty prompt.
COMFYUI_BASE = GenerateRequest(prompt_syntax="comfyui", noise=Noise(posterior="mean", step_rng="cuda"))
MOST_NODES = 5_000
SIDES = {"positive", "negative"}
TEXTS, SETTINGS, ADDS = (names()["comfyui"][one] for one in ("texts", "settings", "adds"))

Node = Mapping[str, Any]


def parse(graph: Mapping[str, Any]) -> Told | None:
    """Read a graph in API format; None if the object is not a graph or has no sampler."""
    nodes = {str(name): one for name, one in list(graph.items())[:MOST_NODES] if _is_node(one)}
    samplers = [one for one in nodes.values() if _samples(one)]
    # The first pass: the sampler whose latents do not come from another sampler.
    first = next((one for one in samplers if not any(_samples(up) for up in _up(nodes, one, {"latent_image"}))), None)
    if first is None:
        return None
    notes = [f"{len(samplers) - 1} further samplers are ignored"] if len(samplers) > 1 else []
    found = {key: _setting(nodes, first, inputs) for key, inputs in SETTINGS.items()}
    fields = {key: str(value) for key, value in found.items() if value is not None and value != ""}
    if found["Denoising strength"] in (1, 1.0):
        fields.pop("Denoising strength", None)
    fields |= _latent(nodes, first) | _clip_skip(nodes.values())
    notes += [note for one in nodes.values() for note in _adds(one)]
    texts = [_text(nodes, first, side) for side in ("positive", "negative")]
    return Told("ComfyUI", texts[0] or "", texts[1], fields, COMFYUI_BASE, tuple(notes), "comfyui")


def _is_node(one: Any) -> bool:
    return isinstance(one, dict) and isinstance(one.get("inputs"), dict) and isinstance(one.get("class_type"), str)


def _adds(node: Node) -> list[str]:
    """Return a note for each addition that a node makes to the checkpoint."""
    named = {kind: node["inputs"].get(key) for kind, key in ADDS.items() if kind in node["class_type"]}
    return [f"{kind} {name[:100]} is ignored" for kind, name in named.items() if isinstance(name, str)]


def _samples(node: Node) -> bool:
    inputs = node["inputs"]
    return node["class_type"].startswith("SamplerCustom") or (
        bool(inputs.keys() & {"seed", "noise_seed"}) and ("steps" in inputs and "positive" in inputs)
    )


def _up(nodes: Mapping[str, Node], start: Node, names: set[str] | None = None, side: str = "") -> Iterator[Node]:
    """Yield the nodes upstream of `start`, nearest first.

    names: inputs of `start` to follow (default: all except prompts and latents); side: the prompt to follow through
    nodes that pass on both.
    """
    seen: set[int] = {id(start)}
    wave = [start]
    while wave:
        following = []
        for node in wave:
            inputs = node["inputs"]
            wanted = names if node is start else {side} if side in inputs else None
            for key, link in inputs.items():
                if wanted is not None and key not in wanted:
                    continue
                if wanted is None and node is start and key in (*SIDES, "latent_image", "samples"):
                    continue
                above = nodes.get(str(link[0])) if isinstance(link, list) and len(link) == 2 else None
                if above is not None and id(above) not in seen:
                    seen.add(id(above))
                    following.append(above)
                    yield above
        wave = following


def _setting(nodes: Mapping[str, Node], start: Node, inputs: Sequence[str]) -> Any:
    """Return the value of the first of these inputs that a node has, following a link if the value comes from one."""
    for node in (start, *_up(nodes, start)):
        for name in inputs:
            value = node["inputs"].get(name)
            if isinstance(value, list) and node is start:
                above = next(_up(nodes, start, {name}), {"inputs": {}})
                value = next((one for one in above["inputs"].values() if isinstance(one, int | float | str)), None)
            if isinstance(value, int | float | str) and not isinstance(value, bool):
                return value
    return None


def _text(nodes: Mapping[str, Node], start: Node, side: str) -> str | None:
    """Return the prompt of one side: all texts upstream, without repetitions."""
    # Newer samplers get both prompts from a guider.
    begin = next((node for node in (start, *_up(nodes, start)) if side in node["inputs"]), None)
    if begin is None:
        return None
    said = [node["inputs"][key] for node in _up(nodes, begin, {side}, side) for key in TEXTS
            if isinstance(node["inputs"].get(key), str)]  # fmt: skip
    return ", ".join(dict.fromkeys(said)) if said else None


def _latent(nodes: Mapping[str, Node], first: Node) -> dict[str, str]:
    above = (node["inputs"] for node in _up(nodes, first, {"latent_image"}))
    sides = ((one.get("width"), one.get("height")) for one in above)
    return next(({"Size": f"{w}x{h}"} for w, h in sides if isinstance(w, int) and isinstance(h, int)), {})


def _clip_skip(nodes: Any) -> dict[str, str]:
    found = [one["inputs"]["stop_at_clip_layer"] for one in nodes if "stop_at_clip_layer" in one["inputs"]]
    layers = found[0] if found else 0
    return {"Clip skip": str(-layers)} if isinstance(layers, int) and layers < -1 else {}
