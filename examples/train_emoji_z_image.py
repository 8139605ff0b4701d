"""Train a small text-to-image teacher in the shape of Z-Image on emoji, on a laptop's CPU.

    python examples/train_emoji_z_image.py data/emoji runs/emoji-z-image --minutes 50

runs/emoji-z-image opens with diffusers.ZImagePipeline.from_pretrained; its samples/ show the progress. All classes are those
of the released model: ZImageTransformer2DModel, AutoencoderKL with scale and shift (the weights are the bundled emoji VAE's),
Qwen2Tokenizer with a chat template, and a Qwen3Model of two layers that is trained together with the transformer. The
pictures, the split into trained and held-out texts and how captions are drawn are train_emoji_teacher.py's.

Needs diffusers and transformers beside the package.
"""

import argparse
import copy
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from emoji_teacher_data import CAPTION_SHARES, Captions, Pictures, Split, read_pictures, split_texts
from emoji_teacher_models import count_parameters
from emoji_teacher_training import Budget, train, whitened_components
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from fewstep.diffusion.condition import Condition
from fewstep.errors import UserError
from fewstep.families.registry import family_named
from fewstep.formats.atomic import written_aside
from fewstep.formats.bundled import bundled_path
from fewstep.formats.pixels import save_grid

SHIFT = 3.0
TEXT_WIDTH, TEXT_BATCH, TEXT_RATE = 128, 128, 1e-3
SIZES = {"dim": 128, "n_layers": 8, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [8, 12, 12]}
# as Qwen3's own reads a single message of a user; nothing follows where thinking is left on
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(texts: list[str]) -> Any:
    """Qwen's tokenizer over bytes, its merges from these texts."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1500, min_frequency=2, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    learner.train_from_iterator([*texts, *(["user", "assistant"] * 100)], trainer)
    found = json.loads(learner.to_str())["model"]
    kind: Any = Qwen2Tokenizer
    return kind(
        vocab=found["vocab"], merges=[tuple(pair) for pair in found["merges"]], model_max_length=512,
        chat_template=CHAT_TEMPLATE, extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip


def build_networks(tokenizer: Any, sizes: dict[str, Any], text_layers: int) -> nn.ModuleDict:
    """Transformer and text encoder; the pipeline reads the state before the last layer, which is there and never trained."""
    encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=3 * TEXT_WIDTH,
            num_hidden_layers=text_layers + 1, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
            max_position_embeddings=512, initializer_range=0.05,
        )
    )  # fmt: skip
    transformer = ZImageTransformer2DModel(
        in_channels=4, cap_feat_dim=TEXT_WIDTH, axes_lens=[1024, 64, 64], **sizes
    )  # fmt: skip
    final: Any = transformer.all_final_layer["2-1"].linear
    nn.init.zeros_(final.weight)
    nn.init.zeros_(final.bias)
    return nn.ModuleDict({"transformer": transformer, "text_encoder": encoder})


class ChatCaptions(Captions):
    """Captions in their chat template, of different lengths.

    Attributes:
        lengths: tokens of each variant of each text.
    """

    def encode(self, tokenizer: Any, flat: list[str]) -> None:
        chat = family_named("z-image").text_layout.chat  # type: ignore[attr-defined]
        found = tokenizer(
            [chat(tokenizer, caption) for caption in flat], padding=True, padding_side="right", return_tensors="pt"
        )
        self.ids = found.input_ids.view(-1, len(CAPTION_SHARES), found.input_ids.shape[1])
        self.lengths = found.attention_mask.sum(1).view(-1, len(CAPTION_SHARES))

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of pictures (B,), ids (B, T) and tokens (B,) of their captions."""
        rows, variants = self.choose(batch, generator)
        chosen = self.text_of_row[rows], variants
        lengths = self.lengths[chosen]
        return rows, self.ids[chosen][:, : int(lengths.max())], lengths


def encode_text(networks: nn.ModuleDict, ids: Tensor, lengths: Tensor) -> Tensor:
    """The states that the pipeline reads, (B, T, D)."""
    mask = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
    states: Tensor = networks["text_encoder"](ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
    return states


def teach_text(networks: nn.ModuleDict, latents: Tensor, captions: ChatCaptions, steps: int, seed: int) -> None:
    """A start for the text encoder: guess the picture's coarse content from the last token, which has seen the whole caption."""
    generator, target = torch.Generator().manual_seed(seed), whitened_components(latents)
    head = nn.Linear(TEXT_WIDTH, target.shape[1])
    optimizer = torch.optim.AdamW([*networks["text_encoder"].parameters(), *head.parameters()], lr=TEXT_RATE)
    for step in range(steps):
        rows, ids, lengths = captions.draw(TEXT_BATCH, generator)
        states = encode_text(networks, ids, lengths)
        loss = (head(states[torch.arange(len(ids)), lengths - 1]) - target[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"text: step {step + 1} of {steps}, loss {loss:.3f} of 1 at the start", flush=True)


def velocity(networks: nn.ModuleDict, noisy: Tensor, level: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
    """noise - x0 as the transformer predicts it at levels (B,), (B, 4, h, w)."""
    family: Any = family_named("z-image")
    denoiser = family.build_around(networks["transformer"], {"shift": SHIFT}, noisy.shape[-1])
    text = encode_text(networks, ids, lengths)
    condition = Condition(len(noisy), {"text": text, "text_length": lengths})
    predicted: Tensor = denoiser.run_network(noisy, level, condition, "x0")[0]
    return predicted


@torch.no_grad()
def open_vae(pictures: Pictures) -> tuple[AutoencoderKL, Tensor]:
    """The bundled emoji VAE with the shift and scale of these pictures' latents, and the latents (N, 4, 16, 16)."""
    vae = AutoencoderKL.from_pretrained(bundled_path("emoji/sd/vae")).float().eval()
    rows = torch.arange(len(pictures.texts)).split(64)
    means = torch.cat([vae.encode(pictures.batch(part)).latent_dist.mean for part in rows])
    shift, scale = float(means.mean()), 1 / float(means.std())
    vae.register_to_config(shift_factor=shift, scaling_factor=scale, sample_size=pictures.pixels.shape[-1])
    return vae, (means - shift) * scale


def save_folder(folder: Path, vae: AutoencoderKL, networks: nn.ModuleDict, tokenizer: Any, split: Split) -> Any:
    """Write the pipeline with split.json; it appears whole or not at all. Returns the pipeline."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    pipeline: Any = ZImagePipeline(vae=vae, tokenizer=tokenizer, scheduler=scheduler, **networks)
    with written_aside(folder) as aside:
        pipeline.save_pretrained(aside)
        (aside / "split.json").write_text(json.dumps(split, indent=1, ensure_ascii=False), encoding="utf-8")
    return pipeline


def main(arguments: list[str] | None = None, sizes: dict[str, Any] | None = None) -> None:
    """Train and write the folder.

    Raises:
        UserError: the pictures cannot be used.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the pictures and metadata.jsonl")
    parser.add_argument("out", type=Path, help="folder of the pipeline; samples lie beside it in OUT-samples")
    parser.add_argument("--minutes", type=float, default=50.0)
    parser.add_argument("--steps", type=int, help="train so many steps, whatever time they take")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--text-steps", type=int, default=400, help="first steps, for the text alone")
    parser.add_argument("--sampling-steps", type=int, default=20, help="steps of the sample grids")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    pictures = read_pictures(options.data)
    split = split_texts(pictures.groups)
    seen = pictures.of(list(split["train"]))
    samples = options.out.with_name(options.out.name + "-samples")
    samples.mkdir(parents=True, exist_ok=True)
    vae, latents = open_vae(seen)
    tokenizer = build_tokenizer(list(split["train"]))
    captions = ChatCaptions(tokenizer, seen.texts)
    networks = build_networks(tokenizer, sizes or SIZES, text_layers=2)
    print(f"{shlex.join(sys.argv)}: {count_parameters({**networks, 'vae': vae})}", flush=True)
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(split["train"]), generator=torch.Generator().manual_seed(0)).tolist()[:8]
    prompts = [list(split["train"])[number] for number in order] + list(split["held_out"])[:8]

    def loss_of() -> Tensor:
        rows, ids, lengths = captions.draw(options.batch, generator)
        clean, noise = latents[rows], torch.randn(latents[rows].shape, generator=generator)
        # one noise level from each of B equal ranges, shifted as the pipeline samples
        u = (torch.arange(options.batch) + torch.rand(options.batch, generator=generator)) / options.batch
        level = SHIFT * u / (1 + (SHIFT - 1) * u)
        sigma = level.view(-1, 1, 1, 1)
        predicted = velocity(networks, (1 - sigma) * clean + sigma * noise, level, ids, lengths)
        return (predicted.float() - (noise - clean)).square().mean()

    def look(average: nn.ModuleDict, step: int) -> None:
        parts = nn.ModuleDict({name: copy.deepcopy(network).eval() for name, network in average.items()})
        pipeline = save_folder(options.out, vae, parts, tokenizer, split)
        pipeline.set_progress_bar_config(disable=True)
        side = pictures.pixels.shape[-1]
        images = pipeline(
            list(prompts), num_inference_steps=options.sampling_steps, guidance_scale=3.0, height=side, width=side,
            generator=torch.Generator().manual_seed(0), output_type="pt",
        ).images  # fmt: skip
        save_grid(samples / f"{step:06d}.png", images * 2 - 1, columns=8)

    teach_text(networks, latents, captions, options.text_steps, options.seed)
    budget = Budget(options.minutes, options.steps)
    train("sd", networks, options.batch, budget, loss_of, look)
    print(f"{options.out}: {budget.done} steps")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
