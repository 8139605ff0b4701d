"""Train small text-to-image teachers in the shapes of Stable Diffusion and SDXL on emoji, on a laptop's CPU.

    python examples/train_emoji_teacher.py data/emoji runs/emoji --stage vae     # 10 minutes on 2 cores
    python examples/train_emoji_teacher.py data/emoji runs/emoji --stage sd      # 28 minutes, needs vae
    python examples/train_emoji_teacher.py data/emoji runs/emoji --stage sdxl    # 20 minutes, needs vae

    python examples/train_emoji_teacher.py data/emoji runs/emoji --stage sd --more       # train an earlier result on

runs/emoji/sd opens with diffusers.StableDiffusionPipeline.from_pretrained and runs/emoji/sdxl with
StableDiffusionXLPipeline; runs/emoji/samples shows the progress. data/emoji holds 64x64 pictures and a metadata.jsonl
with file_name, text and group. 8% of the texts are never trained on; split.json names them.

Needs diffusers and transformers beside the package.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from emoji_teacher_data import Captions, Pictures, Split, build_tokenizer, read_pictures, split_texts
from emoji_teacher_models import (
    NOISE_SCHEDULE,
    Sizes,
    assemble,
    build_networks,
    build_vae,
    card_of,
    count_parameters,
    load_earlier,
    predict_noise,
    save_folder,
)
from emoji_teacher_training import Budget, autoencoder_loss, diffusion_loss, fast_precision, teach_text, train
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.formats.atomic import written_aside
from fewstep.formats.pixels import save_grid

MINUTES = {"vae": 10.0, "sd": 28.0, "sdxl": 20.0}  # what ships was trained this long
BATCH = {"vae": 8, "sd": 32, "sdxl": 32}


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pictures: Pictures, batch: int = 64) -> Tensor:
    """Posterior means of all pictures, unscaled, (N, 4, 16, 16)."""
    rows = torch.arange(len(pictures.texts)).split(batch)
    with fast_precision():
        means = [vae.encode(pictures.batch(part)).latent_dist.mean.float() for part in rows]
    return torch.cat(means).contiguous()


def run_vae(options: argparse.Namespace, pictures: Pictures, split: Split, budget: Budget, sizes: Sizes) -> None:
    """Train the autoencoder; write out/vae with the latents of the training pictures."""
    out = options.out
    seen, held_out = pictures.of(list(split["train"])), pictures.of(list(split["held_out"]))
    vae = build_vae(sizes)
    print(count_parameters({"vae": vae}))
    generator = torch.Generator().manual_seed(options.seed)
    unseen = held_out.batch(torch.randperm(len(held_out.texts), generator=generator)[:64])

    def loss_of() -> Tensor:
        rows = torch.randint(len(seen.texts), (options.batch,), generator=generator)
        return autoencoder_loss(vae, seen.batch(rows), generator)

    @torch.no_grad()
    def look(average: AutoencoderKL, step: int) -> None:
        decoded = average.decode(average.encode(unseen).latent_dist.mean).sample
        error = (decoded - unseen).abs().mean() * 127.5
        print(f"vae: step {step}, mean error on held-out pictures {error:.2f} of 255", flush=True)
        save_grid(out / f"samples/vae_{step:06d}.png", torch.cat([unseen[:16], decoded[:16]]), columns=16)

    vae = train("vae", vae, options.batch, budget, loss_of, look)
    latents = encode_all(vae, seen)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    with written_aside(out / "vae") as aside:
        vae.save_pretrained(aside)
        save_file({"latents": latents * vae.config.scaling_factor}, aside / "latents.safetensors")
        (aside / "split.json").write_text(json.dumps(split))
        (aside / "command.txt").write_text(options.command)
    print(f"{out / 'vae'}: {budget.done} steps, scaling factor {vae.config.scaling_factor:.4f}")


def random_texts(texts: dict[str, str], count: int) -> list[str]:
    """The same few texts in every run."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    return [list(texts)[number] for number in order[:count]]


def run_diffusion(options: argparse.Namespace, pictures: Pictures, split: Split, budget: Budget, sizes: Sizes) -> None:
    """Train text encoders and U-Net together on the stored latents; write the pipeline's folder."""
    out = options.out
    if not (out / "vae/latents.safetensors").is_file():
        raise UserError(f"{out} has no trained autoencoder: run the same command with --stage vae first")
    seen = pictures.of(list(split["train"]))
    latents = load_file(out / "vae/latents.safetensors")["latents"]
    if json.loads((out / "vae/split.json").read_text()) != split or len(latents) != len(seen.texts):
        raise UserError(f"{out / 'vae'} was trained on other pictures than {options.data}: run --stage vae again")
    vae = AutoencoderKL.from_pretrained(out / "vae").eval()
    tokenizer = build_tokenizer(list(split["train"]), out / "tokenizer")
    captions = Captions(tokenizer, seen.texts)
    networks = build_networks(options.stage, sizes, tokenizer)
    earlier = load_earlier(networks, out / options.stage) if options.more else None
    parts = count_parameters({**networks, "vae": vae})
    print(parts)
    alphas = DDIMScheduler(**NOISE_SCHEDULE).alphas_cumprod
    generator = torch.Generator().manual_seed(options.seed)
    prompts = [text for part in split.values() for text in random_texts(part, 8)]
    (out / "samples/prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")

    def loss_of() -> Tensor:
        rows, ids, empty = captions.draw(options.batch, generator)
        clean, noise = latents[rows], torch.randn(latents[rows].shape, generator=generator)
        # one noise level from each of B equal ranges: less variance than independent draws
        spread = (torch.arange(options.batch) + torch.rand(options.batch, generator=generator)) / options.batch
        timesteps = (spread * len(alphas)).long().clamp(max=len(alphas) - 1)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        predicted = predict_noise(networks, noisy, timesteps, ids, empty)
        return diffusion_loss(predicted, noise, (alpha / (1 - alpha)).flatten())

    def look(average: nn.ModuleDict, step: int) -> None:
        pipeline = assemble(vae, average, tokenizer)
        pipeline.set_progress_bar_config(disable=True)
        same_noise = torch.Generator().manual_seed(0)
        with fast_precision():
            images = pipeline(
                prompts, num_inference_steps=options.sampling_steps, guidance_scale=4.0, generator=same_noise,
                output_type="pt",
            ).images  # fmt: skip
        save_grid(out / f"samples/{options.stage}_{step:06d}.png", images * 2 - 1, columns=8)
        card = card_of(options.stage, commands, (out / "vae/command.txt").read_text(), step, parts, split)
        save_folder(out / options.stage, vae, average, out / "tokenizer", split, card)

    commands = "\n    ".join([*(earlier or []), options.command])
    if earlier is None:
        teach_text(networks, latents, captions, options.text_steps, options.seed)
    train(options.stage, networks, options.batch, budget, loss_of, look)
    size = sum(path.stat().st_size for path in (out / options.stage).rglob("*") if path.is_file())
    print(f"{out / options.stage}: {budget.done} steps, {size / 1e6:.2f} MB")


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; `command` is what the model card repeats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the pictures and metadata.jsonl")
    parser.add_argument("out", type=Path, help="folder for the autoencoder, the models and the sample grids")
    parser.add_argument("--stage", choices=list(MINUTES), required=True)
    parser.add_argument("--minutes", type=float, help=f"time budget; by default {MINUTES}")
    parser.add_argument("--steps", type=int, help="train so many steps, whatever time they take")
    parser.add_argument("--batch", type=int, help=f"pictures a step; by default {BATCH}")
    parser.add_argument("--text-steps", type=int, default=400, help="first steps of sd and sdxl, for the text alone")
    parser.add_argument("--sampling-steps", type=int, default=20, help="steps of the sample grids")
    parser.add_argument("--more", action="store_true", help="sd and sdxl: train the model in out further")
    parser.add_argument("--seed", type=int, default=0, help="give --more another one: it draws the batches")
    options = parser.parse_args(arguments)
    options.minutes = MINUTES[options.stage] if options.minutes is None else options.minutes
    options.batch = BATCH[options.stage] if options.batch is None else options.batch
    for name in ("minutes", "steps", "batch", "text_steps", "sampling_steps"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be more than 0, not {value}")
    given = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["python", "examples/train_emoji_teacher.py", *given])
    return options


def main(arguments: list[str] | None = None, sizes: Sizes | None = None) -> None:
    """Run one stage.

    Raises:
        UserError: the pictures or an option cannot be used, or the stage before is missing.
    """
    options = read_options(arguments)
    pictures = read_pictures(options.data)
    split = split_texts(pictures.groups)
    print(f"{len(pictures.texts)} pictures; {len(split['train'])} texts to train, {len(split['held_out'])} held out")
    (options.out / "samples").mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    run = run_vae if options.stage == "vae" else run_diffusion
    run(options, pictures, split, Budget(options.minutes, options.steps), sizes or Sizes())


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
