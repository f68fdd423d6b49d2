"""One decoded token against the recurrent form in float64, and the bugs that this must catch.

On a machine without a GPU the kernel runs in Triton's interpreter, in float32.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from poison import poisoned_memory
from seeding import in_the_interpreter, over_the_budget, seed_operator
from torch import Tensor

from linear_moe.forms import Decay, Erase, Recurrence
from linear_moe.kernels import decode
from linear_moe.rules.base import Tokens
from linear_moe.rules.scan import scan
from linear_moe.testing.budget import assert_within_budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float32,)
FORMS = [Recurrence(decay, erase) for decay, erase in itertools.product(Decay, Erase)]
SCALAR_DELTA = Recurrence(Decay.SCALAR, Erase.DELTA)


def draw_tokens(
    form: Recurrence, slots: int, length: int, heads: int, key_heads: int, K: int, V: int, *,
    rate: float = 1.0, dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:  # fmt: skip
    """`[R, T, *]` of what the form takes. Keys have length 1, or a delta rule's state would grow without bound."""
    inputs = {
        "q": torch.randn(slots, length, key_heads, K).to(dtype),
        "k": F.normalize(torch.randn(slots, length, key_heads, K), dim=-1).to(dtype),
        "v": torch.randn(slots, length, heads, V).to(dtype),
    }
    if form.decay is Decay.HEAD:
        inputs["log_decay"] = -rate * torch.rand(heads)
    elif form.decay is not Decay.NONE:
        last = (K,) if form.decay is Decay.VECTOR else ()
        inputs["log_decay"] = -rate * torch.rand(slots, length, heads, *last)
    if form.erase is Erase.DELTA:
        inputs["beta"] = (2 * torch.rand(slots, length, heads)).to(dtype)
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def arguments(inputs: dict[str, Tensor], step: int, state: Tensor, index: Tensor) -> dict[str, Any]:
    """What one step takes. A slice along T is not contiguous."""
    one = {name: x if x.dim() == 1 else x[:, step] for name, x in inputs.items()}
    return {"log_decay": None, "beta": None} | one | {"state": state, "index": index}


def one_token(form: Recurrence, **sizes: Any) -> dict[str, Any]:
    """Arguments of `decode_step` for three slots, the second without a memory, and a state of five rows."""
    sizes = {"heads": 2, "key_heads": 1, "K": 5, "V": 6} | sizes
    state = torch.randn(5, sizes["heads"], sizes["K"], sizes["V"]).to(DEVICE)
    index = torch.tensor([3, -1, 0]).to(DEVICE)
    return arguments(draw_tokens(form, 3, 1, **sizes), 0, state, index) | {"form": form, "scale": 0.5}


def step_of_the_form(state: Tensor, token: Tokens) -> tuple[Tensor, Tensor]:
    write = token.v
    if token.log_decay is not None:
        state = token.log_decay.exp()[..., None] * state
    if token.beta is not None:
        write = token.beta[..., None] * (write - (token.k[..., None, :] @ state).squeeze(-2))
    state = state + token.k[..., :, None] * write[..., None, :]
    return state, (token.q[..., None, :] @ state).squeeze(-2)


def check_against_recurrent(
    module: Any, form: Recurrence, index: list[int], length: int, heads: int, key_heads: int, K: int, V: int, *,
    rate: float = 1.0, dtype: torch.dtype = torch.float32, index_dtype: torch.dtype = torch.int64,
) -> None:  # fmt: skip
    """Single steps give the recurrent form's outputs and states, and leave alone what no slot uses."""
    inputs = draw_tokens(form, len(index), length, heads, key_heads, K, V, rate=rate, dtype=dtype)
    initial = torch.randn(max(index) + 3, heads, K, V).to(DEVICE)
    rows, state, scale = torch.tensor(index).to(DEVICE), initial.clone(), K**-0.5
    outputs = [
        module.decode_step(**arguments(inputs, step, state, rows.to(index_dtype)), form=form, scale=scale)
        for step in range(length)
    ]
    output = torch.stack(outputs, 1)
    used = rows >= 0
    unused_rows = [row for row in range(len(initial)) if row not in index]
    assert output.dtype == dtype
    assert not output[~used].any(), "a slot without a memory reads 0"
    assert torch.equal(state[unused_rows], initial[unused_rows]), "a row without a slot keeps its bits"

    def recurrent(wide: torch.dtype | None) -> dict[str, Tensor]:
        given = {name: x if x.dim() == 1 else x[used] for name, x in inputs.items()}
        result = scan(
            Tokens(**{name: x.to(wide or x.dtype) for name, x in given.items()}), form=form, step=step_of_the_form,
            scale=scale, initial_state=initial[rows[used]], return_final_state=True, impl="recurrent",
        )  # fmt: skip
        assert result.final_state is not None
        return {"output": result.output, "state": result.final_state}

    candidate = {"output": output[used], "state": state[rows[used]]}
    assert_within_budget(candidate, recurrent(None), recurrent(torch.float64))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=8 if DEVICE == "cpu" else 30)
@given(data=st.data())
def test_drawn_shapes_are_within_the_budget(form: Recurrence, dtype: torch.dtype, data: st.DataObject) -> None:
    on_cpu = DEVICE == "cpu"
    rows = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=3 if on_cpu else 6, unique=True), label="rows")
    check_against_recurrent(
        decode,
        form,
        data.draw(st.permutations(rows + [-1] * data.draw(st.integers(0, 2), label="without")), label="index"),
        data.draw(st.integers(1, 3 if on_cpu else 12), label="T"),
        *data.draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (6, 2)]), label="heads"),
        K=data.draw(st.integers(1, 40 if on_cpu else 256), label="K"),
        V=data.draw(st.integers(1, 80 if on_cpu else 300), label="V"),
        rate=data.draw(st.sampled_from([0.0, 0.05, 1.0, 13.8]), label="rate"),
        dtype=dtype,
        index_dtype=data.draw(st.sampled_from([torch.int64, torch.int32]), label="index dtype"),
    )


@pytest.mark.parametrize("largest", decode.LAUNCHES)
def test_every_launch_with_whole_and_cut_tiles(largest: int) -> None:
    tile = decode.LAUNCHES[largest].value_tile
    for K, V in ((largest, 2 * tile), (largest - 1, tile + 1)):
        check_against_recurrent(decode, SCALAR_DELTA, [1], 2, heads=1, key_heads=1, K=K, V=V)


def test_no_slot_and_no_memory() -> None:
    given = one_token(SCALAR_DELTA)
    none = {name: given[name][:0] for name in ("q", "k", "v", "log_decay", "beta", "index")}
    assert decode.decode_step(**given | none).shape == (0, 2, 6)
    given |= {"state": given["state"][:0], "index": torch.full_like(given["index"], -1)}
    assert not decode.decode_step(**given).any()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_same_bits_twice_and_poison_changes_nothing(form: Recurrence) -> None:
    given = one_token(form)
    initial = given["state"].clone()
    once = decode.decode_step(**given)

    twice = given | {"state": initial.clone()}
    with torch.inference_mode():
        assert torch.equal(decode.decode_step(**twice), once)
    assert torch.equal(twice["state"], given["state"])

    poisoned = given | {"state": initial.clone()}
    for name in ("q", "k", "v", "log_decay", "beta"):
        if poisoned[name] is not None and poisoned[name].dim() > 1:
            poisoned[name] = poisoned[name].clone()
            poisoned[name][1] = torch.nan
    poisoned["state"][[1, 2, 4]] = torch.nan
    with poisoned_memory():
        assert torch.equal(decode.decode_step(**poisoned), once)
    assert torch.equal(poisoned["state"][[0, 3]], given["state"][[0, 3]])
    assert poisoned["state"][[1, 2, 4]].isnan().all()


@pytest.mark.parametrize("form", [Recurrence(), SCALAR_DELTA], ids=str)
def test_the_op_is_registered_soundly(form: Recurrence) -> None:
    given = one_token(form)
    tensors = [given[name] for name in ("q", "k", "v", "log_decay", "beta", "state", "index")]
    torch.library.opcheck(decode._decode, (*tensors, form.decay.value, form.erase.value, 0.5))


@pytest.mark.parametrize("form", [Recurrence(Decay.VECTOR), SCALAR_DELTA], ids=str)
def test_compiled_into_one_graph_it_is_the_same(form: Recurrence) -> None:
    given = one_token(form)
    initial = given["state"].clone()
    torch._dynamo.reset()
    compiled = torch.compile(decode.decode_step, fullgraph=True, backend="aot_eager")
    output = compiled(**given)
    eager = given | {"state": initial}
    assert torch.equal(decode.decode_step(**eager), output)
    assert torch.equal(eager["state"], given["state"])


def test_nothing_is_read_back_on_meta() -> None:
    given = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in one_token(SCALAR_DELTA).items()}
    output = decode.decode_step(**given)
    assert output.shape == (3, 2, 6)
    assert output.device.type == "meta"


BAD_INPUT = {
    "q": (lambda q: q[0], r"q must be \[R, H_k, K\], got shape \[1, 5\]"),
    "q dtype": (lambda q: q.double(), "q must be of dtype float32, bfloat16, float16, got torch.float64"),
    "q width": (lambda q: q.new_zeros(3, 1, 257), "q must have a K of 1 to 256, got 257"),
    "k": (lambda k: k[..., 1:], r"k must be \[R, H_k, K\] = \[3, 1, 5\], got shape \[3, 1, 4\]"),
    "k device": (lambda k: k.to("meta"), "k must be on the device of q, .*, got meta"),
    "v": (lambda v: v[0, 0], r"v must be \[R, H, V\], got shape \[6\]"),
    "v slots": (lambda v: v[1:], r"v must be \[R, H, V\] = \[3, 2, 6\], got shape \[2, 2, 6\]"),
    "log_decay": (lambda x: x[..., None], r"log_decay must be \[R, H\] = \[3, 2\], got shape \[3, 2, 1\]"),
    "log_decay dtype": (lambda x: x.bfloat16(), "log_decay must be of dtype float32, got torch.bfloat16"),
    "log_decay presence": (lambda x: None, r"the form \(scalar decay, delta erase\) needs a log_decay, got none"),
    "beta": (lambda x: x[1:], r"beta must be \[R, H\] = \[3, 2\], got shape \[2, 2\]"),
    "beta presence": (lambda x: None, r"the form \(scalar decay, delta erase\) needs a beta, got none"),
    "state": (lambda x: x[..., 1:], r"state must be \[N, H, K, V\] = \[5, 2, 5, 6\], got shape \[5, 2, 5, 5\]"),
    "state dtype": (lambda x: x.bfloat16(), "state must be of dtype float32, got torch.bfloat16"),
    "state layout": (lambda x: x.mT.contiguous().mT, "state must be contiguous, got strides"),
    "index": (lambda x: x[:, None], r"index must be \[R\] = \[3\], got shape \[3, 1\]"),
    "index dtype": (lambda x: x.short(), "index must be of dtype int64, int32, got torch.int16"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named(case: str) -> None:
    change, message = BAD_INPUT[case]
    given = one_token(SCALAR_DELTA)
    name = case.split()[0]
    with pytest.raises(ValueError, match=message):
        decode.decode_step(**given | {name: change(given[name])})


def test_what_the_form_takes_no_part_of_is_refused() -> None:
    given = one_token(SCALAR_DELTA)
    with pytest.raises(ValueError, match=r"the form \(none decay, delta erase\) takes no log_decay, got one"):
        decode.decode_step(**given | {"form": Recurrence(erase=Erase.DELTA)})
    with pytest.raises(ValueError, match=r"the form \(scalar decay, none erase\) takes no beta, got one"):
        decode.decode_step(**given | {"form": Recurrence(Decay.SCALAR)})
    with pytest.raises(ValueError, match="v must have a multiple of q's 2 heads, got 3"):
        decode.decode_step(**given | {"q": given["q"].repeat(1, 2, 1), "v": given["v"][:, [0, 1, 1]]})


@pytest.mark.gpu
def test_states_past_the_int32_offsets() -> None:
    given = one_token(SCALAR_DELTA, heads=1, K=256, V=256)
    state = torch.empty(2**31 // 256**2 + 2, 1, 256, 256, device=DEVICE)
    state[-2:] = given["state"][:2]
    given |= {"state": given["state"][:2].clone(), "index": torch.tensor([1, -1, 0], device=DEVICE)}
    expected = decode.decode_step(**given)
    far = given | {"state": state, "index": torch.tensor([len(state) - 1, -1, len(state) - 2], device=DEVICE)}
    assert torch.equal(decode.decode_step(**far), expected)
    assert torch.equal(state[-2:], given["state"])


@pytest.mark.gpu
def test_more_programs_than_other_grid_dimensions_hold() -> None:
    slots = 70_000
    inputs = draw_tokens(SCALAR_DELTA, slots, 1, heads=1, key_heads=1, K=8, V=8)
    state, index = torch.randn(slots, 1, 8, 8).to(DEVICE), torch.randperm(slots).to(DEVICE)
    whole, parts = state.clone(), state.clone()
    given = arguments(inputs, 0, whole, index)
    output = decode.decode_step(**given, form=SCALAR_DELTA, scale=1.0)
    for part in (slice(0, 40_000), slice(40_000, slots)):
        some = {name: x[part] for name, x in given.items() if name != "state"}
        assert torch.equal(decode.decode_step(**some, state=parts, form=SCALAR_DELTA, scale=1.0), output[part])
    assert torch.equal(whole, parts)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    given = one_token(SCALAR_DELTA)
    decode.decode_step(**given)
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        decode.decode_step(**given)
    finally:
        torch.cuda.set_sync_debug_mode(before)


DECAYED = "            state *= tl.exp(tl.load(decay_ptr + slot_head))\n"
WRITTEN = "        state += k[:, None] * v[None, :]\n"
SEEDED_BUGS = {
    "decay after the write": {DECAYED: "            pass\n", WRITTEN: WRITTEN + DECAYED.removeprefix("    ")},
    "the erase reads what is not decayed": {
        "tl.sum(state * k[:, None], 0)": "tl.sum(tl.load(state_at, mask=in_state, other=0.0) * k[:, None], 0)"
    },
    "a mask dropped": {"in_keys = keys < K\n": "in_keys = keys < K + 2\n"},
    "beta forgotten": {"tl.load(beta_ptr + slot_head).to(tl.float32) * ": ""},
    "a stride swapped": {"slot_head = slot * HEADS + head": "slot_head = slot + head * HEADS"},
    "the state's strides swapped": {"TRANSPOSED=False": "TRANSPOSED=True"},
    "key heads taken in turn": {"head // (HEADS // KEY_HEADS)": "head % KEY_HEADS"},
    "a slot without a memory takes the first": {"if row >= 0:": "row = tl.maximum(row, 0)\n    if row >= 0:"},
    "a read before the write": {
        WRITTEN: "        output = scale * tl.sum(state * q[:, None], 0)\n" + WRITTEN,
        "tl.store(state_at, state, mask=in_state)\n        output = scale * tl.sum(state * q[:, None], 0)\n": (
            "tl.store(state_at, state, mask=in_state)\n"
        ),
    },
}


@in_the_interpreter
@pytest.mark.parametrize("bug", [None, *SEEDED_BUGS])
def test_seeded_bugs_are_caught(bug: str | None, tmp_path: Path) -> None:
    module = seed_operator(decode, {} if bug is None else SEEDED_BUGS[bug], tmp_path)
    # As many slots as heads, and no memory for the last one: what a swapped stride or a dropped mask hits is allocated.
    case = (module, SCALAR_DELTA, [2, 4, 1, -1], 2)
    if bug is None:
        check_against_recurrent(*case, heads=4, key_heads=2, K=6, V=5)
        return
    with over_the_budget("reads 0", "keeps its bits"):
        check_against_recurrent(*case, heads=4, key_heads=2, K=6, V=5)
