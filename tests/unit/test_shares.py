"""What ``--emulate`` says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.config.shares import EXAMPLE, Shares, parse_shares


def parsed(text: str) -> tuple[Shares | None, str]:
    problems = Problems()
    shares = parse_shares(text, problems)
    try:
        problems.raise_if_any()
    except UsageError as error:
        return shares, error.message()
    return shares, ""


def test_the_example():
    assert parsed(EXAMPLE) == (Shares({"attention": 2, "expert": 2}, {"attention": 26, "expert": 24}), "")
    assert parsed(EXAMPLE)[0].by_rank == (26, 26, 24, 24)


@given(st.permutations(["attention", "expert"]), st.integers(1, 5), st.integers(1, 5), st.integers(1, 10), st.sampled_from("% "))
def test_any_order_of_roles_and_attention_ranks_first(order, attention, expert, percent, sign):
    ranks = {"attention": attention, "expert": expert}
    text = ", ".join(f"{role}={ranks[role]}x{percent}{sign.strip()}" for role in order)
    shares, said = parsed(text)
    assert not said and shares.ranks == ranks and shares.by_rank == (percent,) * (attention + expert)


@pytest.mark.parametrize("text, said", [
    ("", "write ROLE=RANKSxPERCENT%"),
    ("attention=2x25%", "says nothing of expert ranks"),
    ("attention=2x25%,expert=2*20%", "has 'expert=2*20%'; write"),
    ("attention=2x25%,attention=2x20%", "the role 'attention' twice"),
    ("attention=2x25%,router=2x20%", "the role 'router'; name attention and expert"),
    ("attention=0x25%,expert=1x20%", "1 or more ranks"),
    ("attention=1x0%,expert=1x101%", "2 problems"),
    ("attention=3x25%,expert=2x20%", "gives away 115%"),
])
def test_what_cannot_be_read(text, said):
    shares, message = parsed(text)
    assert said in message and (shares is None or sum(shares.by_rank) > 100)
