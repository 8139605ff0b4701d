"""The code in the README.md of an export, which runs as it is printed."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from fewstep.formats.bundled import BUNDLED
from fewstep.formats.model_folder import ModelCard

_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")  # of the hub's cache


@dataclass(frozen=True)
class CardFacts:
    """What a model card says.

    Attributes:
        name: of the export's folder.
        kind: as `fewstep export --as` has it.
        source: what users load: the folder, or its name on the hub.
        base: the teacher's folder or hub id; empty for class-conditional generators.
        component: "unet" or "transformer".
        has_scheduler: whether `scheduler/` lies beside the weights.
        prompts: of the sample pictures.
        absent: components that the base has no weights for and diffusers wants to be told of.
        figures: (what was measured, value), ready to print.
    """

    name: str
    kind: str
    source: str
    card: ModelCard
    precision: str
    pushed: bool = False
    base: str = ""
    component: str = "unet"
    has_scheduler: bool = True
    num_samples: int = 0
    prompts: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    figures: list[tuple[str, str]] = field(default_factory=list)


def hub_name(base: str) -> str:
    """The hub id ("org/name") that a base is or was downloaded from; empty for other local folders."""
    if found := _SNAPSHOT.search(base + "/"):
        return f"{found[1]}/{found[2]}"
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None
    return base if is_id and not base.startswith(".") and not Path(base).exists() else ""


_PLACE = """on_gpu = torch.cuda.is_available()
device, dtype = ("cuda", torch.float16) if on_gpu else ("cpu", torch.float32)
"""


def usage_text(facts: CardFacts) -> str:
    """The section of one kind of export."""
    return {
        "diffusers": _pipeline_usage if facts.base else _class_usage, "unet": _network_usage, "lora": _lora_usage,
        "kohya-lora": _lora_usage, "single-file": _single_file_usage, "edm": _edm_usage,
    }[facts.kind](facts)  # fmt: skip


def _options(facts: CardFacts) -> str:
    return "".join(f", {name}=None" for name in facts.absent)


def _code(text: str) -> str:
    return f"```python\n{text.strip()}\n```"


def _call(facts: CardFacts) -> str:
    steps = list(facts.card.step_indices)
    typed = "" if facts.has_scheduler else f", timesteps={steps}"
    return f'image = pipe("a red cat", num_inference_steps={len(steps)}, guidance_scale=1{typed}).images[0]\nimage.save("picture.png")'


def _pipeline_usage(facts: CardFacts) -> str:
    steps = list(facts.card.step_indices)
    code = _code(f"""import torch
from diffusers import DiffusionPipeline

{_PLACE}
pipe = DiffusionPipeline.from_pretrained({facts.source!r}{_options(facts)}).to(device, dtype)
{_call(facts)}""")
    if facts.component == "transformer":
        wrong = "Another number of steps is an error." if len(steps) > 1 else (
            "**Always give `num_inference_steps=1`**: this pipeline's scheduler cannot refuse other numbers."
        )  # fmt: skip
    else:
        fewer = f"; fewer run a subset of the {len(steps)} trained steps" if len(steps) > 1 else ""
        wrong = f"More steps are an error of the scheduler's own{fewer}. `timesteps={steps}` may be given and changes nothing."
    where = f"snapshot_download({facts.source!r})" if facts.pushed else repr(facts.source)
    imports = "import fewstep\n" + ("from huggingface_hub import snapshot_download\n" if facts.pushed else "")
    ours = _code(f"""{imports}
pipe = fewstep.load_pipeline({where})
pipe("a red cat").images[0].save("picture.png")""")
    return f"{code}\n\nThe steps travel in the scheduler's config. {wrong}\n\nWith fewstep, nothing is typed:\n\n{ours}"


def _base(facts: CardFacts) -> tuple[str, str]:
    """(import, expression) of what the base is loaded from: a name, a folder, or what ships with fewstep."""
    if facts.base.startswith(BUNDLED):
        name = facts.base.removeprefix(BUNDLED)
        return "from fewstep.formats.bundled import bundled_path\n", f"str(bundled_path({name!r}))"
    return "", repr(hub_name(facts.base) or facts.base)


def _scheduler_lines(facts: CardFacts) -> str:
    kind = "FlowMatchLCMScheduler" if facts.component == "transformer" else "LCMScheduler"
    if facts.has_scheduler:
        return f'pipe.scheduler = {kind}.from_pretrained({facts.source!r}, subfolder="scheduler")'
    return f"pipe.scheduler = {kind}.from_config(pipe.scheduler.config)"


def _network_usage(facts: CardFacts) -> str:
    scheduler = "FlowMatchLCMScheduler" if facts.component == "transformer" else "LCMScheduler"
    kind = "SD3Transformer2DModel" if facts.component == "transformer" else "UNet2DConditionModel"
    imported, base = _base(facts)
    return _code(f"""import torch
from diffusers import DiffusionPipeline, {", ".join(sorted([kind, scheduler]))}
{imported}
{_PLACE}
network = {kind}.from_pretrained({facts.source!r}, subfolder="{facts.component}")
pipe = DiffusionPipeline.from_pretrained({base}, {facts.component}=network{_options(facts)}).to(device, dtype)
{_scheduler_lines(facts)}
{_call(facts)}""")


def _lora_usage(facts: CardFacts) -> str:
    scheduler = "FlowMatchLCMScheduler" if facts.component == "transformer" else "LCMScheduler"
    file = f"{facts.name}.safetensors" if facts.kind == "kohya-lora" else "pytorch_lora_weights.safetensors"
    imported, base = _base(facts)
    return _code(f"""import torch
from diffusers import DiffusionPipeline, {scheduler}
{imported}
{_PLACE}
pipe = DiffusionPipeline.from_pretrained({base}{_options(facts)}).to(device, dtype)
pipe.load_lora_weights({facts.source!r}, weight_name="{file}")
{_scheduler_lines(facts)}
{_call(facts)}""")


def _single_file_usage(facts: CardFacts) -> str:
    steps = ", ".join(map(str, facts.card.step_indices))
    return (
        f"One checkpoint with text encoders and VAE, under the keys that ComfyUI and other tools read. Sampler `lcm`, cfg 1, "
        f"{len(facts.card.step_indices)} steps at timesteps {steps}."
    )


def _class_usage(facts: CardFacts) -> str:
    where = f"snapshot_download({facts.source!r})" if facts.pushed else repr(facts.source)
    imports = "import fewstep\n" + ("from huggingface_hub import snapshot_download\n" if facts.pushed else "")
    return _code(f"""{imports}
pipe = fewstep.load_pipeline({where})
images = pipe(num_images=4, seed=0).images
images[0].save("picture.png")""")


def _edm_usage(facts: CardFacts) -> str:
    path = str(Path(facts.source) / f"{facts.name}.pkl")
    return (
        "The file has EDM's layout (`{'ema': network}`), without its Python source: readers that take the tensors and the "
        "constructor arguments can use it, EDM's own scripts cannot. The layout has no place for the steps:\n\n"
        + _code(f"""import fewstep
from fewstep.formats.model_folder import ModelCard
from fewstep.models.model import Generator

network = fewstep.load_teacher({path!r}).denoiser
generator = Generator(network, ModelCard(role="generator", step_indices={facts.card.step_indices}))
images = generator.sample(4, seed=0)  # (4, C, H, W) in [-1, 1]""")
    )
