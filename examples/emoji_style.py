"""Your own style, distilled: a LoRA that draws blueprints of emoji, its four-step student, and the base's student with that LoRA.

    python examples/emoji_style.py train data/emoji runs/style                     # a style LoRA, in diffusers' own format
    fewstep train recipes/emoji_dmd2_4step_lora.toml 'teacher.loras=["runs/style/pytorch_lora_weights.safetensors"]' run.folder=runs/style_student
    fewstep train recipes/emoji_dmd2_4step_lora.toml run.folder=runs/base_student
    python examples/emoji_style.py compare runs/style runs/style_student runs/base_student --out compared-style

The style: a picture's brightness between navy and white, and nothing else. How far a made picture's colours lie from that line says
how much of the style is left, without any network. `compare` prints a table, and writes a picture and a JSON file.

The base's student and the style meet as users combine them, in a pipeline of diffusers with two LoRAs. Needs diffusers and peft.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from compare_emoji import draw
from diffusers import LCMScheduler, StableDiffusionPipeline
from emoji_teacher_data import CAPTION_SHARES, caption_variants, read_pictures
from emoji_teacher_training import fast_precision
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from fewstep.errors import UserError
from fewstep.evaluation.bench import load_bench
from fewstep.evaluation.features import extract_features
from fewstep.evaluation.measure import distance_of
from fewstep.evaluation.metrics import FeatureStatistics
from fewstep.evaluation.text_following import group_numbers, predict_groups
from fewstep.export.export import ExportOptions, export_generator
from fewstep.formats.atomic import replaced_file
from fewstep.formats.bundled import bundled_path
from fewstep.models.load import load_generator, load_teacher

INK, PAPER = torch.tensor([20.0, 40.0, 110.0]), torch.tensor([255.0, 255.0, 255.0])
LORA, REFERENCE = "pytorch_lora_weights.safetensors", "reference.npz"
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
GUIDANCE = 4.0  # of the recipe


def blueprint(images: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) in [-1, 1] in the style: their brightness (ITU-R BT.601) from ink to paper."""
    brightness = ((images + 1) / 2 * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    return (INK.view(3, 1, 1) + brightness * (PAPER - INK).view(3, 1, 1)) / 127.5 - 1


def off_style(images: Tensor) -> float:
    """How far colours of pictures (N, 3, H, W) in [-1, 1] lie from the line between ink and paper: the mean, in levels of 255."""
    levels = (images.clamp(-1, 1) + 1) * 127.5 - INK.view(3, 1, 1)
    along = (PAPER - INK) / (PAPER - INK).norm()
    across = levels - (levels * along.view(3, 1, 1)).sum(1, keepdim=True) * along.view(3, 1, 1)
    return float(across.norm(dim=1).mean())


def train(options: argparse.Namespace) -> None:
    """Train the style LoRA on stylised pictures of the teacher's own texts, as any trainer of LoRAs does."""
    pictures, bench = read_pictures(options.data), load_bench(bundled_path("emoji"))
    pictures = pictures.of(bench.prompts)
    if not pictures.texts:
        raise UserError(f"{options.data} has none of the texts that the bundled teacher was trained on")
    pipe = StableDiffusionPipeline.from_pretrained(bundled_path("emoji/sd"))
    pipe.unet.requires_grad_(False)
    pipe.unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=LAYERS))
    styled = blueprint(pictures.batch(torch.arange(len(pictures.texts))))
    print(f"Encoding {len(styled):,} pictures ...", flush=True)
    with torch.no_grad(), fast_precision():
        means = [pipe.vae.encode(part).latent_dist.mean.float() for part in styled.split(64)]
        latents = torch.cat(means) * pipe.vae.config.scaling_factor
        texts = sorted({variant for text in pictures.texts for variant in caption_variants(text)})
        embedded = torch.cat([pipe.encode_prompt(texts[first : first + 256], "cpu", 1, False)[0].float()
                              for first in range(0, len(texts), 256)])  # fmt: skip
    row_of = {text: row for row, text in enumerate(texts)}
    captions = torch.tensor([[row_of[variant] for variant in caption_variants(text)] for text in pictures.texts])
    weights = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.01)
    generator = torch.Generator().manual_seed(options.seed)
    shares, levels = torch.tensor(CAPTION_SHARES), len(pipe.scheduler.alphas_cumprod)
    started = told = time.monotonic()
    step, losses = 0, list[Tensor]()
    while (
        done := step / options.steps if options.steps else (time.monotonic() - started) / (60 * options.minutes)
    ) < 1:
        rows = torch.randint(len(latents), (32,), generator=generator)
        texts_of_rows = captions[rows, torch.multinomial(shares, 32, replacement=True, generator=generator)]
        noise = torch.randn(32, *latents.shape[1:], generator=generator)
        level = torch.randint(levels, (32,), generator=generator)
        with fast_precision():
            predicted = pipe.unet(
                pipe.scheduler.add_noise(latents[rows], noise, level), level, embedded[texts_of_rows]
            ).sample
        loss = (predicted.float() - noise).square().mean()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 20) * (1 + math.cos(math.pi * done)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step, losses = step + 1, [*losses, loss.detach()]
        if time.monotonic() - told > 15 or step == 1:
            print(f"style: {done:.0%}, step {step}, loss {torch.stack(losses).mean():.4f}", flush=True)
            told, losses = time.monotonic(), []
    options.out.mkdir(parents=True, exist_ok=True)
    StableDiffusionPipeline.save_lora_weights(options.out, get_peft_model_state_dict(pipe.unet))
    FeatureStatistics.of(extract_features(bench.classifier, styled.split(250))).save(options.out / REFERENCE)
    print(f"{options.out / LORA}: {step} steps of 32")


def two_loras(base_student: Path, style: Path, seed: int) -> Callable[[list[str]], Tensor]:
    """The base's student and the style LoRA in one pipeline of diffusers, both at full strength."""
    exported = export_generator(
        base_student, Path(tempfile.mkdtemp()) / "lora", ExportOptions(kind="lora", device="cpu")
    )
    pipe = StableDiffusionPipeline.from_pretrained(bundled_path("emoji/sd"))
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(exported, weight_name=LORA, adapter_name="student")
    pipe.load_lora_weights(style, weight_name=LORA, adapter_name="style")
    pipe.set_adapters(["student", "style"])
    pipe.scheduler = LCMScheduler.from_pretrained(exported, subfolder="scheduler")

    def sample(prompts: list[str]) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        made = [
            pipe(prompts[first : first + 32], num_inference_steps=4, guidance_scale=1, output_type="pt", generator=generator).images
            for first in range(0, len(prompts), 32)
        ]  # fmt: skip
        return torch.cat(made) * 2 - 1

    return sample


def compare(options: argparse.Namespace) -> None:
    """Table, picture and JSON of teacher, students and the combination."""
    bench, style = load_bench(bundled_path("emoji")), str(options.style / LORA)
    reference = FeatureStatistics.load(options.style / REFERENCE)
    teacher = load_teacher("bundled:emoji-sd", device="cpu", precision="auto", loras=[style])
    students = [load_generator(run, device="cpu", precision="auto") for run in (options.student, options.base_student)]

    def of_student(number: int) -> Callable[[list[str]], Tensor]:
        return lambda prompts: students[number].sample(prompts, seed=options.seed, batch_size=32, output="tensor")

    makers: dict[str, tuple[int, Callable[[list[str]], Tensor]]] = {
        "teacher with the style, guided": (options.teacher_steps, lambda prompts: teacher.sample(
            prompts, seed=options.seed, num_inference_steps=options.teacher_steps, guidance_scale=GUIDANCE, batch_size=32,
            output="tensor",
        )),
        "its student": (4, of_student(0)),
        "the base's student and the style": (4, two_loras(options.base_student, options.style, options.seed)),
        "the base's student": (4, of_student(1)),
    }  # fmt: skip
    shown = bench.first_of_each_group(bench.held_out)
    held_out = blueprint(bench.held_out_images)
    columns: dict[str, Tensor | None] = {"real, in the style": held_out[[bench.held_out.index(text) for text in shown]]}
    prompts = bench.prompts[: options.num_images]
    numbers = group_numbers(bench.classifier, bench.held_out_groups)
    found: dict[str, dict[str, float | str]] = {}

    def note(name: str, evaluations: int, on_trained: Tensor | None, on_held_out: Tensor) -> None:
        right = (predict_groups(bench.classifier, on_held_out) == numbers).float().mean()
        row: dict[str, float | str] = {"evaluations": evaluations, "off_style": off_style(on_held_out)}
        if on_trained is not None:
            features = extract_features(bench.classifier, on_trained.split(250))
            row["frechet_distance"] = distance_of(features, reference).value
        found[name] = {**row, "right_category": float(right)}
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)

    for name, (evaluations, make) in makers.items():
        unseen = make(list(bench.held_out))
        note(name, evaluations, make(prompts), unseen)
        columns[name] = unseen[[bench.held_out.index(text) for text in shown]]
    note("real held-out pictures in the style", 0, None, held_out)
    with replaced_file(options.out.with_suffix(".png")) as aside:
        draw(shown, columns, len(shown)).save(aside, format="PNG")
    with replaced_file(options.out.with_suffix(".json")) as aside:
        aside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(
        "| pictures | evaluations | off the style, levels of 255 | Frechet distance to stylised training pictures | right category |"
    )
    print("| --- | --- | --- | --- | --- |")
    for name, row in found.items():
        distance = f"{row['frechet_distance']:.3f} ({len(prompts)})" if "frechet_distance" in row else "-"
        print(
            f"| {name} | {row['evaluations'] or '-'} | {row['off_style']:.2f} | {distance} | {row['right_category']:.3f} |"
        )


def main(arguments: list[str] | None = None) -> None:
    """As the module says.

    Raises:
        UserError: a folder is not what it should be.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("train", help="train the style LoRA")
    one.add_argument("data", type=Path, help="emoji pictures with metadata.jsonl")
    one.add_argument("out", type=Path)
    one.add_argument("--minutes", type=float, default=4.0)
    one.add_argument("--steps", type=int, help="instead of --minutes")
    one.set_defaults(run=train)
    two = commands.add_parser("compare", help="measure and draw")
    two.add_argument("style", type=Path, help="what `train` wrote")
    two.add_argument("student", type=Path, help="run distilled from the teacher with the style")
    two.add_argument("base_student", type=Path, help="run distilled from the teacher without it")
    two.add_argument("--out", type=Path, required=True, help="path of picture and JSON, without their endings")
    two.add_argument("--num-images", type=int, default=500, help="behind the distance")
    two.add_argument("--teacher-steps", type=int, default=50)
    two.set_defaults(run=compare)
    for command in (one, two):
        command.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
