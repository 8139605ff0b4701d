"""A workflow run unedited by ComfyUI's own nodes, in its own environment (`make test-clients` with COMFYUI_DIR).

    cd COMFYUI_DIR && python comfyui.py WORKFLOW.json FOLDER_OF_MODELS OUT.npz

Writes the latents that its sampler ends in and the noises it drew, in order. What its log says of keys that were left out
is written too. Written against ComfyUI's documented node interface (NODE_CLASS_MAPPINGS, FUNCTION, node schemas of API v3).
"""

import asyncio
import inspect
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np


class Told(logging.Handler):
    """What was logged about keys."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        words = record.getMessage().lower()
        if (
            any(word in words for word in ("missing", "unexpected", "not loaded", "left over", "leftover"))
            and "[]" not in words
        ):
            self.lines.append(record.getMessage()[:500])


def record_noise(noises: list[np.ndarray]) -> None:
    """Keep every noise that the starting latent and the sampler get."""
    import comfy.k_diffusion.sampling as sampling
    import comfy.sample

    prepare, default = comfy.sample.prepare_noise, sampling.default_noise_sampler

    def prepared(*arguments: Any, **options: Any) -> Any:
        found = prepare(*arguments, **options)
        noises.append(found.float().cpu().numpy())
        return found

    def sampler(*arguments: Any, **options: Any) -> Any:
        inner = default(*arguments, **options)

        def draw(*levels: Any) -> Any:
            found = inner(*levels)
            noises.append(found.float().cpu().numpy())
            return found

        return draw

    comfy.sample.prepare_noise, sampling.default_noise_sampler = prepared, sampler


def run(graph: dict[str, Any], nodes: Any) -> dict[str, Any]:
    """The outputs of every node but the one that saves the picture."""
    done: dict[str, Any] = {}

    def value(given: Any) -> Any:
        return done[given[0]][given[1]] if isinstance(given, list) else given

    for number, node in graph.items():
        if node["class_type"] == "SaveImage":
            continue
        kind = nodes.NODE_CLASS_MAPPINGS[node["class_type"]]
        inputs = {name: value(given) for name, given in node["inputs"].items()}
        if hasattr(kind, "execute") and hasattr(kind, "define_schema"):
            made = kind.execute(**inputs)
        else:
            made = getattr(kind(), kind.FUNCTION)(**inputs)
        done[number] = getattr(made, "result", made)
    return done


def main() -> None:
    """As the module says."""
    workflow, models, out = sys.argv[1:4]
    sys.argv[1:] = ["--cpu", "--force-fp32"]
    sys.path.insert(0, str(Path.cwd()))
    told = Told()
    logging.getLogger().addHandler(told)
    import comfy.options

    comfy.options.enable_args_parsing()
    import folder_paths
    import nodes
    import torch

    for kind in ("checkpoints", "loras"):
        folder_paths.add_model_folder_path(kind, models)
    found = nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False)
    if inspect.isawaitable(found):
        asyncio.run(found)
    noises: list[np.ndarray] = []
    record_noise(noises)
    graph = json.loads(Path(workflow).read_text())
    with torch.inference_mode():
        done = run(graph, nodes)
    sampled = next(number for number, node in graph.items() if node["class_type"] == "SamplerCustom")
    latents = done[sampled][0]["samples"].float().cpu().numpy()
    np.savez(out, latents=latents, noises=np.stack(noises), told=np.array(told.lines, dtype=str))


if __name__ == "__main__":
    main()
