"""Agreement between predicted and asked-for groups, in closed form and against all orders of the prompts."""

import itertools

import pytest
import torch

from fewstep.errors import UserError
from fewstep.evaluation.features import SmallClassifier
from fewstep.evaluation.measurement import Value
from fewstep.evaluation.text_following import (
    group_numbers,
    group_of,
    measure_text_following,
    predict_groups,
    retrieval_recall,
    text_following,
)


def groups(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


def test_all_right() -> None:
    """Two groups of equal size: perfect agreement, half of it by chance."""
    found = text_following(groups(0, 0, 1, 1), groups(0, 0, 1, 1))
    assert found == {"agreement": Value(1.0, 4), "balanced": Value(1.0, 4), "shuffled": Value(0.5, 4)}


def test_all_wrong() -> None:
    found = text_following(groups(1, 1, 0, 0), groups(0, 0, 1, 1))
    assert [value.value for value in found.values()] == [0.0, 0.0, 0.5]


def test_a_model_that_ignores_its_prompts_is_as_good_as_shuffled() -> None:
    """It always shows the largest group: right as often as that group is asked for, and no better than the control."""
    found = text_following(groups(2, 2, 2, 2, 2), groups(2, 2, 2, 0, 1))
    assert found["agreement"].value == found["shuffled"].value == pytest.approx(3 / 5)
    assert found["balanced"].value == pytest.approx(1 / 3)


def test_large_groups_count_more_in_agreement_only() -> None:
    found = text_following(groups(0, 0, 0, 0), groups(0, 0, 0, 5))
    assert (found["agreement"].value, found["balanced"].value) == (pytest.approx(3 / 4), pytest.approx(1 / 2))


def test_shuffled_is_the_mean_over_all_orders() -> None:
    predicted, wanted = groups(0, 1, 1, 3, 2), groups(0, 1, 2, 3, 1)
    orders = [torch.tensor(order) for order in itertools.permutations(range(5))]
    mean = torch.stack([(predicted == wanted[order]).double().mean() for order in orders]).mean()
    assert text_following(predicted, wanted)["shuffled"].value == pytest.approx(float(mean))


@pytest.mark.parametrize(
    ("predicted", "wanted"), [(groups(), groups()), (groups(1), groups(1, 2)), (groups(1)[None], groups(1)[None])]
)
def test_not_one_prompt_a_picture(predicted: torch.Tensor, wanted: torch.Tensor) -> None:
    with pytest.raises(UserError, match="text following compares one predicted group a picture"):
        text_following(predicted.long(), wanted.long())


def test_groups_of_texts() -> None:
    assert group_of("hand: left, thumb, people & body") == "people & body"
    classifier = SmallClassifier(3, 2, width=4, class_names=["food", "flags"])
    assert group_numbers(classifier, ["flags", "food", "flags"]).tolist() == [1, 0, 1]
    with pytest.raises(UserError, match=r"classifier does not know the group 'hats'; it knows food, flags"):
        group_numbers(classifier, ["food", "hats"])


class Reader(SmallClassifier):
    """Says what is written in the first pixel."""

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        said = ((images[:, 0, 0, 0] + 1) * 127.5).round().long()
        return torch.nn.functional.one_hot(said, 3).float()


def test_pictures_are_judged_batch_by_batch() -> None:
    classifier = Reader(3, 3, width=4, class_names=["a", "b", "c"], name="reader")
    written = groups(0, 1, 2, 2, 1)
    images = (written / 127.5 - 1)[:, None, None, None].expand(-1, 3, 8, 8)
    assert torch.equal(predict_groups(classifier, images, batch_size=2), written)
    found = measure_text_following(classifier, images, ["a", "b", "c", "a", "b"])
    assert found["agreement"] == Value(pytest.approx(4 / 5), 5)


def test_retrieval() -> None:
    """A picture finds its own text's when nothing lies nearer; with all neighbours everything is found."""
    torch.manual_seed(0)
    real = torch.randn(20, 6)
    assert retrieval_recall(real, real, 1) == 1.0
    assert retrieval_recall(real + 1e-3 * torch.randn(20, 6), real, 1) == 1.0
    turned = real.roll(1, dims=0)  # every picture shows the text before
    assert retrieval_recall(turned, real, 1) == 0.0
    assert retrieval_recall(turned, real, 20) == 1.0
    with pytest.raises(UserError, match="picture i with picture i"):
        retrieval_recall(real[:3], real)


def test_retrieval_of_unrelated_pictures_is_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    made, real = (torch.randn(1500, 16, generator=generator) for _ in range(2))
    assert retrieval_recall(made, real, 150) == pytest.approx(0.1, abs=0.03)
