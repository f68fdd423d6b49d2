from __future__ import annotations

from pathlib import Path

import pytest
import torch

from linear_moe import MemoryLayer, MemoryState, MoMLayer
from linear_moe.layers.state_file import STATE_FORMAT


def layer() -> MoMLayer:
    return MoMLayer(8, num_memories=3, num_heads=2, head_dim=4, head_value_dim=6)


@torch.no_grad()
def filled(batch: int = 3) -> MemoryState:
    mixer = layer()
    state = mixer.new_state(batch)
    mixer(torch.randn(batch, 7, 8), state=state)
    return state


def test_its_tensors_have_the_documented_shapes_and_dtypes() -> None:
    tensors = {name: (tuple(t.shape), t.dtype) for name, t in layer().new_state(2).tensors().items()}
    assert tensors == {
        "memory": ((2, 4, 2, 4, 6), torch.float32),
        # q and k of 8 channels, v of 12
        "conv": ((2, 4, 4, 28), torch.float32),
        "tokens_seen": ((2,), torch.int64),
    }


def test_the_conv_on_the_input_has_one_row() -> None:
    mixer = MoMLayer(8, num_heads=1, head_dim=4, conv_scope="sequence", conv_width=3)
    conv = mixer.new_state(2).conv
    assert conv is not None and conv.shape == (2, 1, 3, 8)


def test_a_rule_without_a_conv_has_no_conv_state() -> None:
    assert MoMLayer(8, "gla", num_heads=1, head_dim=4).new_state(2).conv is None


def test_dtypes_follow_the_layer() -> None:
    bf16 = MoMLayer(8, num_heads=1, head_dim=4, dtype=torch.bfloat16).new_state(1)
    assert bf16.conv is not None
    assert (bf16.memory.dtype, bf16.conv.dtype) == (torch.float32, torch.bfloat16)
    fp64 = MoMLayer(8, num_heads=1, head_dim=4, dtype=torch.float64).new_state(1)
    assert fp64.conv is not None
    assert (fp64.memory.dtype, fp64.conv.dtype) == (torch.float64, torch.float64)
    asked = layer().new_state(1, dtype=torch.float64)
    assert asked.conv is not None and asked.conv.dtype == torch.float64


def test_nbytes_counts_all_tensors() -> None:
    assert layer().new_state(2).nbytes == 4 * 2 * 4 * (2 * 4 * 6 + 4 * 28) + 8 * 2


def test_select_reorders_and_repeats_sequences() -> None:
    state = filled()
    chosen = state.select(torch.tensor([2, 0, 0, 1]))
    assert chosen.batch_size == 4
    for name, tensor in state.tensors().items():
        assert torch.equal(chosen.tensors()[name], tensor[[2, 0, 0, 1]])
    chosen.memory.zero_()
    assert state.memory.any()


def test_a_clone_shares_nothing() -> None:
    state = filled()
    copied = state.clone()
    for name, tensor in state.tensors().items():
        assert torch.equal(copied.tensors()[name], tensor)
        assert copied.tensors()[name].data_ptr() != tensor.data_ptr()


def test_detach_keeps_the_numbers_and_drops_the_graph() -> None:
    mixer = layer()
    state = mixer.new_state(1)
    mixer(torch.randn(1, 3, 8), state=state)
    assert state.memory.requires_grad
    detached = state.detach()
    assert not detached.memory.requires_grad
    assert torch.equal(detached.memory, state.memory)


def test_what_is_saved_is_loaded_and_continues_the_same(tmp_path: Path) -> None:
    mixer = layer()
    with torch.no_grad():
        state = mixer.new_state(2)
        mixer(torch.randn(2, 5, 8), state=state)
        state.save(tmp_path / "state.pt")
        loaded = MemoryState.load(tmp_path / "state.pt")
        x = torch.randn(2, 3, 8)
        assert torch.equal(mixer(x, state=loaded), mixer(x, state=state))
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_a_carried_graph_does_not_hinder_saving(tmp_path: Path) -> None:
    mixer = layer()
    state = mixer.new_state(1)
    mixer(torch.randn(1, 3, 8), state=state)
    state.save(tmp_path / "state.pt")
    assert torch.equal(MemoryState.load(tmp_path / "state.pt").memory, state.memory)


def test_a_state_without_a_conv_is_saved_too(tmp_path: Path) -> None:
    state = MoMLayer(8, "gla", num_heads=1, head_dim=4).new_state(2)
    state.save(tmp_path / "state.pt")
    assert MemoryState.load(tmp_path / "state.pt").conv is None


@pytest.mark.parametrize(
    "content", [{"weights": torch.zeros(2)}, [1], {"format": STATE_FORMAT + 1}, {"format": STATE_FORMAT}]
)
def test_another_file_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=f"other.pt holds no memory state of format {STATE_FORMAT}"):
        MemoryState.load(tmp_path / "other.pt")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.pt").write_text("hello")
    with pytest.raises(ValueError, match="other.pt holds no memory state"):
        MemoryState.load(tmp_path / "other.pt")


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_state_has_at_least_one_sequence(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {batch_size}"):
        layer().new_state(batch_size)


@pytest.mark.parametrize(
    "other, message",
    [
        (
            MoMLayer(8, num_heads=2, head_dim=4, layer_index=1, num_layers=2),
            r"state belongs to MoMLayer 1 \(gated_deltanet\)",
        ),
        (MoMLayer(8, "deltanet", num_heads=2, head_dim=4), r"state belongs to MoMLayer 0 \(deltanet\)"),
        (MemoryLayer(8, num_heads=2, head_dim=4), r"state belongs to MemoryLayer 0"),
        (MoMLayer(8, num_memories=5, num_heads=2, head_dim=4), r"state.memory must be \[B, memories, H, K, V\]"),
    ],
)
def test_the_state_of_another_layer_is_refused(other: MoMLayer | MemoryLayer, message: str) -> None:
    mixer = MoMLayer(8, num_heads=2, head_dim=4)
    with pytest.raises(ValueError, match=message):
        mixer(torch.randn(2, 3, 8), state=other.new_state(2))


def test_the_state_of_another_batch_is_refused() -> None:
    mixer = layer()
    with pytest.raises(
        ValueError, match=r"state.memory must be .* = \[2, 4, 2, 4, 6\] for this call, got \[3, 4, 2, 4, 6\]"
    ):
        mixer(torch.randn(2, 3, 8), state=mixer.new_state(3))
    with pytest.raises(ValueError, match=r"= \[3, 4, 2, 4, 6\] for this call, got \[1, 4, 2, 4, 6\]"):
        mixer(torch.randn(1, 9, 8), cu_seqlens=torch.tensor([0, 2, 5, 9]), state=mixer.new_state(1))


def test_the_state_of_another_conv_is_refused() -> None:
    wide, narrow = (MoMLayer(8, num_heads=2, head_dim=4, conv_width=width) for width in (4, 3))
    with pytest.raises(ValueError, match="conv"):
        wide(torch.randn(2, 3, 8), state=narrow.new_state(2))
    on_input = MoMLayer(8, num_heads=2, head_dim=4, conv_scope="sequence")
    with pytest.raises(ValueError, match="conv"):
        wide(torch.randn(2, 3, 8), state=on_input.new_state(2))


def test_a_state_without_a_conv_that_is_needed_is_refused() -> None:
    with_conv = MoMLayer(8, "retnet", num_heads=2, head_dim=4, rule_options={"short_conv": True})
    without = MoMLayer(8, "retnet", num_heads=2, head_dim=4)
    with pytest.raises(ValueError, match="conv"):
        with_conv(torch.randn(2, 3, 8), state=without.new_state(2))
    with pytest.raises(ValueError, match="conv"):
        without(torch.randn(2, 3, 8), state=with_conv.new_state(2))


def test_something_else_is_no_state() -> None:
    mixer = layer()
    with pytest.raises(ValueError, match="state must be one of class MemoryState, from new_state, got dict"):
        mixer(torch.randn(2, 3, 8), state={})  # type: ignore[arg-type]
