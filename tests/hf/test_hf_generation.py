"""`generate` on the model's state gives what it gives when every step runs the whole text again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import KINDS, draw, make, pad
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from linear_moe.hf import LinearMoECache
from linear_moe.models import ModelState

NEW = 7
GREEDY = {"do_sample": False, "max_new_tokens": NEW}


@pytest.fixture(params=KINDS, ids=str)
def model(request: pytest.FixtureRequest) -> Any:
    # float64: a step of one token and a pass over all of them then agree far below the distance of two likeliest tokens.
    return make(KINDS[request.param], dtype=torch.float64)


def several(*lengths: int) -> list[torch.Tensor]:
    return [draw(1, length)[0] for length in lengths]


def test_greedy_decoding_is_the_recomputation(model: Any) -> None:
    prompts = draw(3, 6)
    cached = model.generate(prompts, **GREEDY, output_logits=True, return_dict_in_generate=True)
    again = model.generate(prompts, **GREEDY, output_logits=True, return_dict_in_generate=True, use_cache=False)
    assert cached.sequences.shape == (3, 6 + NEW)
    assert torch.equal(cached.sequences, again.sequences)
    for one, other in zip(cached.logits, again.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert isinstance(cached.cache, LinearMoECache)
    assert cached.cache.get_seq_length() == 6 + NEW - 1
    assert again.cache is None
    # And it is the language model's own.
    assert torch.equal(cached.sequences, model.model.generate(prompts, max_new_tokens=NEW))


def test_left_padded_prompts_are_continued_as_alone(model: Any) -> None:
    texts = several(6, 2, 4)
    tokens, mask = pad(texts)
    expected = torch.cat([model.generate(text[None], **GREEDY)[:, len(text) :] for text in texts])
    for use_cache in (True, False):
        continued = model.generate(tokens, attention_mask=mask, **GREEDY, use_cache=use_cache)
        assert torch.equal(continued[:, 6:], expected)


def test_no_mask_goes_with_tokens_that_were_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A masked step would come to the same, by a longer way."""
    model = make("mom full")
    tokens, mask = pad(several(6, 2))
    masks, run = [], model.model.hidden

    def watched(tokens: torch.Tensor, *, padding_mask: torch.Tensor | None, **options: Any) -> torch.Tensor:
        masks.append(padding_mask)
        return run(tokens, padding_mask=padding_mask, **options)

    monkeypatch.setattr(model.model, "hidden", watched)
    model.generate(tokens, attention_mask=mask, **GREEDY)
    assert torch.equal(masks[0], mask.bool())
    assert masks[1:] == [None] * (NEW - 1)


def test_the_mask_is_read_off_the_pad_token() -> None:
    model = make("mom full", dtype=torch.float64)
    texts = [text.clamp_min(1) for text in several(5, 3)]
    tokens, mask = pad(texts, pad_token=0)
    options = GREEDY | {"pad_token_id": 0}
    assert torch.equal(model.generate(tokens, **options), model.generate(tokens, attention_mask=mask, **options))


@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_beam_search_is_the_recomputation(model: Any, options: dict[str, Any]) -> None:
    tokens, mask = pad(several(5, 3))
    found = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        arguments = {"num_beams": 4, "max_new_tokens": NEW, "do_sample": False, "use_cache": use_cache} | options
        found.append(model.generate(tokens, attention_mask=mask, **arguments))
    assert torch.equal(*found)


def test_beams_change_places() -> None:
    """A search that never reorders would pass without `reorder_cache`."""
    model = make("mom full", dtype=torch.float64)
    moves = []

    class Watched(LinearMoECache):
        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            moves.append(beam_idx.tolist())
            super().reorder_cache(beam_idx)

    arguments = {"num_beams": 4, "max_new_tokens": NEW, "do_sample": False}
    prompts = draw(2, 5)
    found = model.generate(prompts, cache=Watched(), **arguments)
    assert any(move != sorted(move) or len(set(move)) < len(move) for move in moves)
    assert torch.equal(found, model.generate(prompts, **arguments))


def test_sampling_draws_from_the_same_distribution(model: Any) -> None:
    prompts = draw(3, 4)
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        options = {"do_sample": True, "top_k": 6, "temperature": 1.3, "max_new_tokens": NEW}
        drawn.append(model.generate(prompts, **options, use_cache=use_cache))
    assert torch.equal(*drawn)
    torch.manual_seed(4)
    assert not torch.equal(drawn[0], model.generate(prompts, **options))


def test_a_sequence_that_has_ended_is_filled_up() -> None:
    model, prompts = make("mom full", dtype=torch.float64), draw(3, 4).clamp_min(1)
    free = model.generate(prompts, **GREEDY)[:, 4:].tolist()
    stop = free[0][1]
    ends = [row.index(stop) + 1 if stop in row else NEW for row in free]
    expected = [(row[:end] + [0] * NEW)[: max(ends)] for row, end in zip(free, ends, strict=True)]
    held = model.generate(prompts, **GREEDY, eos_token_id=stop, pad_token_id=0)
    assert held[:, 4:].tolist() == expected


def test_a_streamer_gets_every_token_as_it_comes() -> None:
    model, prompt = make("mom full", dtype=torch.float64), draw(1, 5)

    class Listener(BaseStreamer):
        def __init__(self) -> None:
            self.heard: list[list[int]] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.heard.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    listener = Listener()
    sequence = model.generate(prompt, **GREEDY, streamer=listener)[0].tolist()
    assert listener.heard == [prompt[0].tolist(), *([token] for token in sequence[5:])]
    assert listener.ended


def test_prefill_in_chunks_is_prefill(model: Any) -> None:
    tokens, mask = pad(several(7, 2))
    expected = model.generate(tokens, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(tokens, attention_mask=mask, **GREEDY, prefill_chunk_size=3), expected)


def test_generation_goes_on_from_a_cache(model: Any, tmp_path: Path) -> None:
    """The text before is not run again, whether it is given again or not; a state may come from a file."""
    prompts, more = draw(2, 6), draw(2, 3)
    with torch.no_grad():
        cache = model(prompts, use_cache=True).cache
    whole = torch.cat((prompts, more), 1)
    expected = model.generate(whole, **GREEDY)
    kept = copy.deepcopy(cache)
    assert torch.equal(model.generate(whole, cache=cache, **GREEDY), expected)
    assert cache.num_columns == 6 + 3 + NEW - 1
    kept.state.save(tmp_path / "state.pt")
    resumed = LinearMoECache(ModelState.load(tmp_path / "state.pt"))
    assert resumed.num_columns == kept.num_columns == 6
    assert torch.equal(model.generate(whole, cache=resumed, **GREEDY), expected)
    with torch.no_grad():
        logits = model(more, cache=kept).logits
    torch.testing.assert_close(logits, model(whole).logits[:, 6:], rtol=0, atol=1e-10)


def test_a_cache_is_filled_split_and_joined_by_sequence() -> None:
    model, prompts = make("mom full", dtype=torch.float64), draw(2, 5)
    cache = LinearMoECache()
    assert (len(cache), cache.batch_size, cache.get_seq_length(), cache.is_initialized) == (0, -1, 0, False)
    with torch.no_grad():
        model(prompts, cache=cache)
    assert (len(cache), cache.batch_size, cache.get_seq_length(), cache.is_initialized) == (2, 2, 5, True)
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([5, 0]))
    token = draw(2, 1)
    with torch.no_grad():
        logits = model(token, cache=cache).logits
    expected = model(torch.cat((prompts[[1, 0]], token), 1)).logits[:, -1:]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    cache.reset()
    assert (cache.batch_size, cache.get_seq_length()) == (-1, 0)


def test_a_state_is_of_the_batch_and_the_model_that_made_it() -> None:
    model = make("mom full")
    with torch.no_grad():
        cache = model(draw(2, 5), use_cache=True).cache
    with pytest.raises(ValueError, match="state is of 2 sequences, this call has 3"):
        model(draw(3, 1), cache=cache)
    with pytest.raises(ValueError, match="state belongs to a model of another configuration"):
        make("mom")(draw(2, 1), cache=cache)
    assert cache.num_columns == 5


def test_the_mask_of_a_whole_text_goes_with_its_last_tokens() -> None:
    model = make("mom full", dtype=torch.float64)
    tokens, mask = pad(several(7, 4))
    expected = model(tokens, mask).logits
    with torch.no_grad():
        cache = model(tokens[:, :4], mask[:, :4], use_cache=True).cache
        whole, part = copy.deepcopy(cache), cache
        for last in (model(tokens[:, 4:], mask, cache=whole), model(tokens[:, 4:], mask[:, 4:], cache=part)):
            torch.testing.assert_close(last.logits, expected[:, 4:], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "static"}, "cache_implementation must be None.*got 'static'"),
        ({"cache": DynamicCache()}, "cache must be a LinearMoECache, got DynamicCache"),
        ({"prompt_lookup_num_tokens": 2}, "assisted generation is not supported with stateful models"),
        ({"position_idz": 1}, "position_idz"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "attention_mask must end with a real token in every row"),
    ],
)
def test_what_can_not_be_is_refused_in_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("mom").generate(draw(1, 4), **GREEDY, **options)


def test_a_cache_is_not_cropped() -> None:
    cache = LinearMoECache()
    cache.crop(0)
    with pytest.raises(ValueError, match="tokens_to_remove must be 0, got -1"):
        cache.crop(-1)
    assert not cache.is_croppable
