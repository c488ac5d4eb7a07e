"""Choices that hang on rounding: which these are, and that no other is taken over."""

from __future__ import annotations

import torch
from near_ties import NEAR, decided, near_choices

SCORES = torch.tensor([
    [0.5, 0.4, 0.4 * (1 - NEAR / 2), 0.1],  # the second and the third are within rounding
    [0.5, 0.4, 0.3, 0.1],
    [0.5, 0.0, 0.0, 0.0],  # the second has no score
])


def _chosen(scores: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return torch.topk(scores, 2, dim).indices


def test_a_choice_between_scores_within_rounding_is_near():
    numbers, chosen = near_choices(SCORES, _chosen(SCORES), dim=-1)
    assert numbers.tolist() == [0] and chosen.tolist() == [[0, 1]]


def test_choices_along_another_dimension():
    numbers, chosen = near_choices(SCORES.t(), _chosen(SCORES.t(), 0), dim=0)
    assert numbers.tolist() == [0] and chosen.tolist() == [[0, 1]]


def test_scores_that_cannot_be_chosen_do_not_count():
    scores = SCORES.clone()
    scores[0, 0] = scores[1, 3] = -torch.inf
    numbers, _ = near_choices(scores, _chosen(scores), dim=-1)
    assert numbers.tolist() == []


def test_a_near_choice_is_decided_as_noted_and_no_other():
    noted = torch.tensor([0, 1]), torch.tensor([[0, 2], [0, 3]])
    indices, others = decided(SCORES, _chosen(SCORES), -1, noted)
    assert indices.tolist() == [[0, 2], [0, 1], _chosen(SCORES)[2].tolist()] and others == 1
    indices, others = decided(SCORES.t(), _chosen(SCORES.t(), 0), 0, noted)
    assert indices.t().tolist()[:2] == [[0, 2], [0, 1]] and others == 1


def test_what_was_chosen_alike_keeps_its_order():
    noted = torch.tensor([0]), torch.tensor([[1, 0]])
    indices, others = decided(SCORES, _chosen(SCORES), -1, noted)
    assert indices.equal(_chosen(SCORES)) and others == 0
