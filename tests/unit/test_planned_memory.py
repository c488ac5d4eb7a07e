"""What a rank needs, beside what ranks of an H200 were seen to take."""

import random
from dataclasses import replace

import pytest
from pricing import group, profile
from test_bench import modules

from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.config.shape import ModelShape
from megatron_hetermoe.planner.memory import fullest, member_memory

bench = modules("allocator")
MIB = 2**20

# Mixtral-D1 on four ranks of one H200, with CUDA graphs and merged gradients of weights: attention and expert ranks, tokens of
# a sequence, sequences of a microbatch, microbatches on the way, (layer, expert) pairs of an attention and of an expert rank,
# GB of the fullest rank of each role by torch.cuda.max_memory_reserved.
MEASURED = [
    ((3, 1), 8192, 1, 4, (32, 96), (27.84, 44.33)),
    ((3, 1), 4096, 2, 4, (32, 96), (27.86, 48.04)),
    ((3, 1), 4096, 1, 8, (36, 84), (28.33, 40.61)),
    ((2, 2), 16384, 1, 2, (27, 69), (27.81, 28.06)),
    ((2, 2), 8192, 1, 6, (0, 96), (16.22, 46.91)),
]
KEPT = 20476  # bytes that a layer's attention was measured to keep of a token


def d1(tokens):
    return ModelShape(
        layers=8, moe_layers=tuple(range(1, 9)), experts=24, topk=2, hidden=1024, expert_ffn=3584, dense_ffn=3584,
        shared_expert_ffn=0, gated=True, heads=16, query_groups=8, head_dim=64, tied_embeddings=False, sequence=tokens)


@pytest.mark.parametrize("ranks, tokens, micro_batch, wave, pairs, measured", MEASURED)
def test_memory_is_as_measured(ranks, tokens, micro_batch, wave, pairs, measured):
    of = d1(tokens)
    taken = profile(of, memory={"attention_activation_per_token": KEPT})
    priced = group(*ranks, of, wave, taken, taken, micro_batch=micro_batch)
    priced = replace(priced, step=replace(priced.step, vocabulary=32_000, cuda_graphs=True))
    for member, held, seen in zip((0, ranks[0]), pairs, measured):
        memory = member_memory(priced, member, held, wave, weight_gradients="merged")
        assert memory.total - memory.outside == pytest.approx(seen * 1e9, rel=0.08)


def test_a_rank_with_many_experts_gets_about_its_part_of_the_rows():
    """Of all of them exactly that; of few more than that, as the fullest of some ranks."""
    loads = [fullest(held, 192) for held in (1, 12, 96, 191)]
    assert loads == sorted(loads, reverse=True) and loads[-1] > fullest(192, 192) == fullest(0, 192) == 1
    rows = [held * fullest(held, 192) for held in range(193)]
    assert rows == sorted(rows)


def test_graphs_have_memory_of_their_own():
    """For each microbatch on the way a copy of each layer's input, and what a forward needs; once what backwards need."""
    priced = group(2, 2)
    graphs = replace(priced, step=replace(priced.step, cuda_graphs=True))
    more = [member_memory(graphs, 0, 0, wave).total - member_memory(priced, 0, 0, wave).total for wave in (1, 2)]
    token = 2 * priced.shape.hidden * priced.rank_tokens
    assert more[1] - more[0] == token * (priced.shape.layers + 2 + 2) and more[0] > more[1] - more[0]
    assert member_memory(graphs, 2, 3, 2) == member_memory(priced, 2, 3, 2)


def test_experts_of_a_layer_need_room_together():
    """Their backward has gradients of all of them at once: of outputs, inputs and what is between two products, and of weights."""
    priced = group(2, 2)
    rows, hidden, inner = priced.expert_tokens, priced.shape.hidden, priced.shape.expert_ffn
    one, two = (member_memory(priced, 2, 3 * held, 1, 1).transient for held in (1, 2))
    waiting = rows * hidden
    assert two - one == 2 * (rows * (3 * hidden + 3 * inner) + priced.shape.expert_weights + waiting)


def test_a_free_block_serves_what_is_no_larger():
    allocator = bench.allocator.Allocator()
    large = allocator.take(100 * MIB)
    allocator.give(large)
    first, second = allocator.take(60 * MIB), allocator.take(30 * MIB)
    assert allocator.reserved == 100 * MIB and allocator.needed == 90 * MIB
    allocator.give(first)
    third = allocator.take(61 * MIB)  # 60 and 10 are free, but not beside each other
    assert allocator.reserved == 161 * MIB + MIB  # whole pairs of MiB
    allocator.give(second, third)
    assert allocator.needed == 0 and allocator.take(100 * MIB).size == 100 * MIB and allocator.reserved == 162 * MIB


def test_the_allocator_needs_what_is_planned_for_and_more():
    """Where rows differ from microbatch to microbatch and from step to step by up to a fifth."""
    plan = Plan(d1(8192), 3, 1, 1, ((0, 1, 2) * 4 + (3,) * 12,) * 8, wave=4)
    draw = random.Random(3)
    steps = [{(layer, microbatch): round(24576 * draw.uniform(0.8, 1.2)) for layer in range(1, 9) for microbatch in range(4)}
             for _ in range(8)]
    found = bench.allocator.replay(plan, 3, steps)
    assert 0.15 < (found.reserved - found.most) / (found.most - found.needed) < 0.5
