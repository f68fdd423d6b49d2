"""Segments cut into pieces, and the pieces' transitions joined again."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl
from cases import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from linear_moe.kernels.blocks import block_of, load_start, state_offsets
from linear_moe.kernels.join import Starts, join, join_affine
from linear_moe.kernels.launch import launch_kernel
from linear_moe.kernels.splits import Ragged, Splits, cut, num_pieces, split_length, whole
from linear_moe.testing.budget import assert_within_budget

drawn = settings(max_examples=40 if DEVICE == "cpu" else 100)


def borders_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)


def assert_covered(splits: Splits, lengths: list[int], length: int) -> None:
    """Every segment's pieces are its tokens in order, once, each full but the last; what is past the last piece is empty."""
    assert splits.first is not None and splits.owner is not None
    first, owner, borders = splits.first.tolist(), splits.owner.tolist(), splits.borders.tolist()
    assert first[-1] <= splits.num_pieces
    start = 0
    for segment, size in enumerate(lengths):
        pieces = range(first[segment], first[segment + 1])
        assert len(pieces) == max(1, -(-size // length)) <= splits.most
        for place, piece in enumerate(pieces):
            stop = start + min((place + 1) * length, size)
            assert borders[piece] == [start + place * length, stop]
            assert owner[piece] == segment
        start += size
    for piece in range(first[-1], splits.num_pieces):
        assert borders[piece] == [0, 0]
        assert owner[piece] < len(lengths)


def assert_parted(splits: Splits) -> None:
    """Pieces that hand a state on are listed once each, and else an empty one; those of segments of one piece are emptied."""
    assert splits.first is not None and splits.several is not None
    borders = splits.borders.tolist()
    segments = list(itertools.pairwise(splits.first.tolist()))
    for reverse in (False, True):
        walked = splits.handing_on(reverse=reverse)
        assert walked.borders is splits.borders and walked.order is not None
        expected = [x for begin, end in segments for x in range(begin + reverse, end - 1 + reverse)]
        order = walked.order.tolist()
        assert order[: len(expected)] == expected
        for piece in order[len(expected) :]:
            assert borders[piece] == [0, 0]
    several = {x for begin, end in segments if end - begin > 1 for x in range(begin, end)}
    assert splits.several.tolist() == [x if i in several else [0, 0] for i, x in enumerate(borders)]


@drawn
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=6),
    length=st.integers(1, 30),
    spare=st.integers(0, 7),
    tight=st.booleans(),
)
def test_pieces_cover_every_segment_once(lengths: list[int], length: int, spare: int, tight: bool) -> None:
    total = sum(lengths) + spare
    splits = cut(borders_of(lengths), total, length, max(lengths) if tight else total)
    assert splits.num_pieces == num_pieces(total, len(lengths), length)
    assert_covered(splits, lengths, length)
    assert_parted(splits)


@pytest.mark.parametrize("longest", [47, 48, 49, 3000])
def test_no_segment_is_cut_where_the_longest_is_not_worth_it(longest: int) -> None:
    """Nothing but the device knows how long it is."""
    lengths = [5, longest, 0, 40]
    ragged = Ragged(borders_of(lengths), 10_000, dense=False)
    splits = ragged.splits(sum(lengths), 16)
    assert splits.num_pieces == ragged.num_pieces(sum(lengths), 16)
    assert_covered(splits, lengths, 16 if longest > 48 else longest)
    assert_parted(splits)


@drawn
@given(
    lengths=st.lists(st.sampled_from([0, 1, 20, 21, 40, 100]), min_size=1, max_size=20),
    worth=st.sampled_from([39, 40, 1000]),
)
def test_uncut_segments_are_walked_longest_first(lengths: list[int], worth: int) -> None:
    """And all pieces once, whether any is cut or not."""
    splits = cut(borders_of(lengths), sum(lengths), 16, max(*lengths, 1), whole=worth)
    assert splits.order is not None
    order = splits.order.tolist()
    assert sorted(order) == list(range(splits.num_pieces))
    if max(lengths) > worth:
        assert order == sorted(order)
    else:
        assert order[: len(lengths)] == sorted(range(len(lengths)), key=lambda segment: -lengths[segment])


def test_many_segments_are_walked_as_they_lie() -> None:
    assert cut(borders_of([3] * 257), 771, 16, 3, whole=48).order is None
    assert cut(borders_of([3] * 256), 768, 16, 3, whole=48).order is not None
    # Those that are cut for good are as long as each other.
    assert cut(borders_of([3] * 2), 6, 16, 3).order is None


@pytest.mark.parametrize("longest", [0, 3, 40])
def test_many_segments(longest: int) -> None:
    """More than one block of segments, and more than one of pieces."""
    lengths = torch.randint(0, longest + 1, (3000,)).tolist()
    splits = cut(borders_of(lengths), sum(lengths), 16, max(longest, 1))
    assert_covered(splits, lengths, 16)
    assert_parted(splits)


@drawn
@given(count=st.integers(1, 5), segment=st.integers(0, 40), length=st.integers(1, 30))
def test_pieces_of_a_batch_need_no_look_at_its_borders(count: int, segment: int, length: int) -> None:
    borders, total = borders_of([segment] * count), count * segment
    batch = Ragged(borders, segment, dense=True)
    splits, expected = batch.pieces(total, length), cut(borders, total, length, segment)
    assert splits.num_pieces == batch.num_pieces(total, length) <= expected.num_pieces
    assert splits.most == expected.most
    assert_covered(splits, [segment] * count, length)
    assert_parted(splits)


def test_pieces_of_a_batch_are_made_once_and_outlive_inference_mode() -> None:
    batch = Ragged(borders_of([90, 90]), 90, dense=True)
    with torch.inference_mode():
        first = batch.pieces(180, 31)
    assert batch.pieces(180, 31).borders is first.borders
    assert not first.borders.is_inference()
    assert Ragged(borders_of([90, 90]), 90, dense=False).pieces(180, 31).borders is not first.borders


@drawn
@given(lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4), small=st.integers(1, 9), times=st.integers(1, 5))
def test_the_smaller_piece_that_each_begins_with(lengths: list[int], small: int, times: int) -> None:
    assert_cut_twice(Ragged(borders_of(lengths), max(lengths), dense=False), sum(lengths), small, times)


@drawn
@given(length=st.integers(1, 90), count=st.integers(1, 4), small=st.integers(1, 9), times=st.integers(1, 5))
def test_the_smaller_piece_that_each_of_a_batch_begins_with(length: int, count: int, small: int, times: int) -> None:
    assert_cut_twice(Ragged(borders_of(count * [length]), length, dense=True), count * length, small, times)


def assert_cut_twice(ragged: Ragged, total: int, small: int, times: int) -> None:
    """As by two calls; and each of the larger pieces begins with a smaller one that begins where it does."""
    for split in (small * times, None):
        pieces, splits = ragged.cut_twice(total, small, split)
        same = (ragged.pieces(total, small), ragged.splits(total, split))
        for twice, once, apart in zip((pieces, splits), same, ({"leading", "trailing"}, {"begins"}), strict=True):
            for name in once._asdict().keys() - apart:
                x, y = getattr(once, name), getattr(twice, name)
                assert torch.equal(x, y) if isinstance(x, Tensor) else x == y, name
        assert splits.begins is not None
        for (start, end), piece in zip(splits.borders.tolist(), splits.begins.tolist(), strict=True):
            assert 0 <= piece < pieces.num_pieces
            if end > start:
                assert pieces.borders[piece, 0] == start


def test_whole_segments() -> None:
    splits = whole(borders_of([3, 0, 4]))
    assert splits.borders.tolist() == [[0, 3], [3, 3], [3, 7]]
    assert not splits.cut


@drawn
@given(
    num_tokens=st.integers(0, 10**7),
    share=st.floats(0, 1),
    walks=st.integers(1, 256),
    processors=st.integers(1, 200),
    chunk=st.sampled_from([32, 64]),
)
def test_where_to_cut(num_tokens: int, share: float, walks: int, processors: int, chunk: int) -> None:
    """In whole chunks, only what is then walked in a third of the time, and into no more than fills the GPU twice."""
    max_length = int(share * num_tokens)
    length = split_length(num_tokens, max_length, walks, processors, chunk)
    if length is not None:
        assert length % chunk == 0 and 0 < 3 * length < max_length
        assert -(-max_length // length) * num_tokens * walks <= 2 * processors * max_length


LENGTHS = [0, 45, 7, 100, 0, 12]
PIECE = 10


def loop(
    increments: Tensor, transitions: Tensor, initial_state: Tensor | None, splits: Splits, reverse: bool
) -> dict[str, Tensor]:
    """The joins as a loop over pieces, in the dtype of the increments."""
    assert splits.first is not None
    first = splits.first.tolist()
    starts, final = torch.zeros_like(increments), []
    for segment in range(len(first) - 1):
        state = torch.zeros_like(increments[0]) if initial_state is None else initial_state[segment]
        pieces = range(first[segment], first[segment + 1])
        for piece in reversed(pieces) if reverse else pieces:
            starts[piece] = state
            state = transitions[piece] @ state + increments[piece]
        final.append(state)
    return {"starts": starts, "final": torch.stack(final)}


@triton.jit
def _load_kernel(
    initial_ptr, joined_ptr, owner_ptr, first_ptr, states_ptr, HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    piece, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    keys, values = tl.arange(0, K_BLOCK), tl.arange(0, V_BLOCK)
    state = load_start(
        initial_ptr, joined_ptr, owner_ptr, first_ptr, piece, head, HEADS, keys, values, K, V, False, REVERSE
    )
    at = state_offsets(piece, head, HEADS, keys, values, K, V, False)
    tl.store(states_ptr + at, state, mask=(keys < K)[:, None] & (values < V)[None, :])


def loaded(starts: Starts, like: Tensor, reverse: bool) -> Tensor:
    """The states `[P, H, K, V]` as walks load them."""
    states = torch.empty_like(like)
    pieces, heads, K, V = like.shape
    launch_kernel(
        _load_kernel, pieces * heads, *starts.arguments(), states, HEADS=heads, K=K, V=V, K_BLOCK=block_of(K),
        V_BLOCK=block_of(V), REVERSE=reverse,
    )  # fmt: skip
    return states


@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("initial", [False, True], ids=["from zeros", "from a state"])
@pytest.mark.parametrize("kind", ["scalar", "per channel", "affine", "affine transposed", "affine at once"])
@pytest.mark.parametrize(("K", "V"), [(5, 7), (40, 33)])
def test_joins_are_a_loop_over_pieces(K: int, V: int, kind: str, initial: bool, reverse: bool) -> None:
    """From what each piece alone does to a state, the state that every piece starts from; pieces of no segment, from zeros."""
    splits = cut(borders_of(LENGTHS), sum(LENGTHS) + 25, PIECE, max(LENGTHS))
    pieces, heads = splits.num_pieces, 2
    assert splits.first is not None and splits.first[-1] < pieces, "some pieces were meant to be of no segment"
    increments = torch.randn(pieces, heads, K, V).to(DEVICE)
    state = torch.randn(len(LENGTHS), heads, K, V).to(DEVICE) if initial else None
    if kind.startswith("affine"):
        transitions = (torch.randn(pieces, heads, K, K) / K**0.5).to(DEVICE)
        if kind == "affine transposed":
            transitions = transitions.mT
        exactly = kind != "affine at once"
        joined, final = join_affine(increments, transitions, state, splits, reverse=reverse, exact=exactly)
        exact = transitions.double()
    else:
        totals = -torch.rand(pieces, heads, *((K,) if kind == "per channel" else ())).to(DEVICE)
        joined, final = join(increments, totals, state, splits, reverse=reverse)
        exact = torch.diag_embed(totals.double().exp().reshape(pieces, heads, -1).expand(-1, -1, K))
    expected = loop(increments.double(), exact, None if state is None else state.double(), splits, reverse)
    # On a GPU, products that leave off the last two bits round four times as much.
    at_once = kind == "affine at once" and DEVICE != "cpu"
    starts = loaded(Starts(state, joined, splits), increments, reverse)
    assert not starts[splits.first[-1] :].any()
    assert_within_budget(
        {"starts": starts, "final": final},
        loop(increments, exact.float(), state, splits, reverse),
        expected,
        terms={name: 4 * x for name, x in expected.items()} if at_once else None,
    )


@pytest.mark.parametrize("K", [20, 211])
def test_an_exact_join_rounds_a_state_once_a_piece(K: int) -> None:
    """However many channels are summed over."""
    lengths = (3, 60)
    splits = cut(borders_of(lengths), sum(lengths), 64, max(lengths))
    increments, state = torch.randn(splits.num_pieces, 1, K, 20).to(DEVICE), torch.randn(2, 1, K, 20).to(DEVICE)
    # A chunk of the delta rule is I but for a few directions: sums that are of a state's own size from its own term on.
    transitions = torch.eye(K, device=DEVICE) + torch.randn(splits.num_pieces, 1, K, K).to(DEVICE) / K
    _, final = join_affine(increments, transitions, state, splits)
    assert final is not None and splits.first is not None and splits.first.tolist() == [0, 1, 2]
    exact = transitions[:2].double() @ state.double() + increments[:2].double()
    error = (final.double() - exact).abs()
    assert (error <= 0.501 * torch.finfo(torch.float32).eps * exact.abs() + 1e-13).all()


@pytest.mark.parametrize(
    ("lengths", "max_length", "dense", "grain"),
    [
        ([64, 64], 64, True, 64),
        ([96, 96], 96, True, 32),
        ([4096], 4096, True, 256),
        ([48, 48], 48, True, 1),
        # Sizes do not say where these end.
        ([64, 128], 128, True, 1),
        ([64, 64], 128, True, 1),
        ([64, 64], 64, False, 1),
        ([0, 0], 0, True, 1),
    ],
)
def test_whole_chunks_are_known_by_sizes_alone(lengths: list[int], max_length: int, dense: bool, grain: int) -> None:
    ragged = Ragged(borders_of(lengths), max_length, dense)
    num_tokens = sum(lengths)
    assert ragged.grain(num_tokens) == grain
    for length in (32, 64, 256):
        assert ragged.in_full(num_tokens, length) == (grain >= length)
