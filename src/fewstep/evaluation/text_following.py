"""Whether pictures show what their prompts ask for, judged by a classifier of the data set."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.evaluation.features import SmallClassifier
from fewstep.evaluation.measurement import Value
from fewstep.formats.pixels import as_eight_bits


def text_following(predicted: Tensor, wanted: Tensor) -> dict[str, Value]:
    """Compare the groups that a classifier saw with those that were asked for.

    `agreement` is the share of pictures whose predicted group is their prompt's, 0..1. `balanced` is the same within each
    group, averaged over the groups that were asked for: large groups count no more. `shuffled` is what `agreement` becomes
    when the prompts change places, on average over all orders: a model that ignores its prompts has both alike.

    The control needs no random permutations: over all orders of the prompts, picture i meets each prompt equally often,
    so the mean agreement is sum over groups g of (share of pictures seen as g) x (share of prompts of g).

    Args:
        predicted, wanted: group numbers, (N,), integers from 0.

    Raises:
        UserError: no pictures, or not one prompt a picture.
    """
    if predicted.shape != wanted.shape or predicted.ndim != 1 or not len(predicted):
        raise UserError(
            f"text following compares one predicted group a picture with its prompt's: {tuple(predicted.shape)} "
            f"predictions, {tuple(wanted.shape)} prompts"
        )
    count = len(predicted)
    right = (predicted == wanted).double()
    size = int(torch.stack([predicted.max(), wanted.max()]).max()) + 1
    asked, seen = (torch.bincount(groups, minlength=size).double() for groups in (wanted, predicted))
    within = torch.zeros(size, dtype=torch.float64).index_add_(0, wanted.cpu(), right.cpu())
    present = asked > 0
    found = {
        "agreement": right.mean(), "balanced": (within[present] / asked[present]).mean(),
        "shuffled": (asked / count * (seen / count)).sum(),
    }  # fmt: skip
    return {name: Value(float(value), count) for name, value in found.items()}


def group_of(text: str) -> str:
    """The group that a text of the bundled emoji names last: "red apple, food & drink" is of "food & drink"."""
    return text.rpartition(", ")[2]


def group_numbers(classifier: SmallClassifier, groups: Sequence[str]) -> Tensor:
    """The classifier's numbers of named groups, (N,), int64.

    Raises:
        UserError: a group that it was not trained on.
    """
    number = {name: place for place, name in enumerate(classifier.class_names)}
    unknown = sorted(set(groups) - set(number))
    if unknown:
        raise UserError(
            f"the classifier {classifier.name} does not know the group {unknown[0]!r}; it knows "
            f"{', '.join(classifier.class_names) or 'no names'}"
        )
    return torch.tensor([number[group] for group in groups], dtype=torch.int64)


@torch.no_grad()
def predict_groups(classifier: SmallClassifier, images: Tensor, batch_size: int = 250) -> Tensor:
    """The group of every picture (N, C, H, W) in [-1, 1], rounded to 8 bit first as files would be; (N,), int64."""
    parts = [torch.empty(0, dtype=torch.int64)]
    for part in images.split(batch_size):
        parts.append(classifier.logits(as_eight_bits(part)).argmax(1).cpu())
    return torch.cat(parts)


def measure_text_following(classifier: SmallClassifier, images: Tensor, groups: Sequence[str]) -> dict[str, Value]:
    """`text_following` of pictures (N, C, H, W) in [-1, 1] made for prompts of these groups (N)."""
    return text_following(predict_groups(classifier, images), group_numbers(classifier, groups))


def retrieval_recall(made: Tensor, real: Tensor, neighbours: int = 10) -> float:
    """Share of made pictures that find the real picture of their own text among the nearest `neighbours` real ones.

    Nearness is the cosine of features after the real ones' mean was taken away. Chance is neighbours / N.

    Args:
        made, real: features (N, F); row i of both belongs to text i.

    Raises:
        UserError: not one real picture for each made one.
    """
    if made.shape != real.shape or made.ndim != 2 or not len(made):
        raise UserError(
            f"retrieval compares picture i with picture i: features {tuple(made.shape)}, {tuple(real.shape)}"
        )
    centre = real.double().mean(0)
    a, b = (torch.nn.functional.normalize(features.double() - centre, dim=1) for features in (made, real))
    likeness = a @ b.T
    own = likeness.diagonal()
    return float(((likeness > own[:, None]).sum(1) < neighbours).double().mean())
