"""What was saved is loaded bit for bit, whatever way; what is not whole, or does not fit, is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hf_models import KINDS, VOCAB, declare, draw, make
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM

from linear_moe.hf import LinearMoEForCausalLM
from linear_moe.models import build_model


def assert_same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    one, other = found.state_dict(), expected.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        assert one[name].dtype == tensor.dtype
        assert torch.equal(one[name], tensor), name


@pytest.mark.parametrize("shard_size", ["1MB", "2KB"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_loading_is_exact(kind: str, tied: bool, shard_size: str, tmp_path: Path) -> None:
    model = make(KINDS[kind], tie_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "2KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LinearMoEForCausalLM
    assert not loaded.training
    assert_same(loaded, model)
    assert all(buffer.device.type == "cpu" for buffer in loaded.buffers())
    tokens = draw()
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    # As trained further: a factor left unset by loading would show in the gradients.
    for one in (loaded, model):
        one.train()(tokens).logits.square().mean().backward()
    for (name, p), (_, q) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_a_tied_head_is_one_matrix(tmp_path: Path) -> None:
    model = make("mom", tie_embeddings=True)
    model.save_pretrained(tmp_path)
    names = safetensors.torch.load_file(tmp_path / "model.safetensors").keys()
    assert "model.embedding.weight" in names
    assert not any("head" in name for name in names)
    assert model.get_output_embeddings() is None


@pytest.mark.parametrize("how", [{"dtype": torch.bfloat16}, {"dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}])
def test_what_is_kept_in_float32_stays_so_in_a_16_bit_model(how: dict[str, Any], tmp_path: Path) -> None:
    make("mom biased full").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **how)
    expected = build_model(declare("mom biased full")).bfloat16()
    dtypes = {name: tensor.dtype for name, tensor in model.model.state_dict().items()}
    assert dtypes == {name: tensor.dtype for name, tensor in expected.state_dict().items()}
    wide = {name.rpartition(".")[2] for name, dtype in dtypes.items() if dtype == torch.float32}
    assert wide == {"A_log", "dt_bias", "bias"}
    assert all(buffer.dtype == torch.float32 for buffer in model.buffers())
    assert model(draw()).logits.dtype == torch.bfloat16
    assert model.config.dtype == torch.bfloat16
    again = tmp_path / "again"
    model.save_pretrained(again)
    assert_same(AutoModelForCausalLM.from_pretrained(again), model)


def test_a_selection_bias_is_loaded_and_not_reset(tmp_path: Path) -> None:
    model = make("biased")
    model.model.blocks[0].mixer.router.bias.bias.copy_(torch.tensor([0.5, -1.0, 2.0]))
    model.save_pretrained(tmp_path)
    bias = LinearMoEForCausalLM.from_pretrained(tmp_path).model.blocks[0].mixer.router.bias
    assert bias.bias.tolist() == [0.5, -1.0, 2.0]
    assert bias.pending.tolist() == [0.0, 0.0, 0.0]


def test_a_device_map_is_worked_out(tmp_path: Path) -> None:
    model = make("mom full")
    model.save_pretrained(tmp_path)
    loaded = LinearMoEForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert_same(loaded.cpu(), model)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_left_on_disk_come_when_they_are_used(tied: bool, tmp_path: Path) -> None:
    layers = "mom gla full one"
    model = make(layers, tie_embeddings=tied)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embedding": "cpu", "model.norm": "cpu", "auxiliary": "cpu", "model.blocks.0": "cpu"}
    places |= {} if tied else {"model.head": "cpu"}
    places |= {f"model.blocks.{index}": "disk" for index in (1, 2, 3)}
    folder = tmp_path / "offloaded"
    loaded = LinearMoEForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=folder)
    assert {p.device.type for p in loaded.model.blocks[1].parameters()} == {"meta"}
    tokens = draw()
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(tokens, **options), model.generate(tokens, **options))


def test_a_language_model_is_wrapped_and_its_checkpoint_loaded(tmp_path: Path) -> None:
    bare = build_model(declare("mom one"))
    wrapped = LinearMoEForCausalLM.from_language_model(bare).eval()
    assert wrapped.model is bare
    tokens = draw()
    assert torch.equal(wrapped(tokens).logits, bare(tokens))
    wrapped.config.save_pretrained(tmp_path)
    safetensors.torch.save_file(bare.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(LinearMoEForCausalLM.from_pretrained(tmp_path), wrapped)
    with pytest.raises(ValueError, match="language_model is of another configuration"):
        LinearMoEForCausalLM(make("mom").config, language_model=bare)


def test_the_way_its_layers_run_can_be_named(tmp_path: Path) -> None:
    make("mom").save_pretrained(tmp_path)
    for impl in ("recurrent", "chunked"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, impl=impl)
        assert model.model.blocks[0].mixer.impl == impl
    with pytest.raises(ValueError, match="impl must be one of"):
        AutoModelForCausalLM.from_pretrained(tmp_path, impl="fast")


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_grows(tied: bool, tmp_path: Path) -> None:
    model, tokens = make("mom full", tie_embeddings=tied), draw()
    before = model(tokens).logits
    model.resize_token_embeddings(VOCAB + 4, mean_resizing=False)
    assert model.config.vocab_size == model.model.config.vocab_size == VOCAB + 4
    torch.testing.assert_close(model(tokens).logits[..., :VOCAB], before)
    model.save_pretrained(tmp_path)
    loaded = LinearMoEForCausalLM.from_pretrained(tmp_path)
    assert_same(loaded, model)
    new = torch.tensor([[1, VOCAB + 3]])
    assert loaded.generate(new, max_new_tokens=2).shape == (1, 4)


def saved(folder: Path, **options: Any) -> Path:
    make("mom full").save_pretrained(folder, **options)
    return folder


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    saved(tmp_path, max_shard_size="2KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=rf"lacks {shard.name}, of the \d+ shards in model.safetensors.index.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("shard_size", ["1MB", "2KB"])
def test_a_variant_is_looked_at_under_its_name(shard_size: str, tmp_path: Path) -> None:
    model = make("mom full")
    model.save_pretrained(tmp_path, max_shard_size=shard_size, variant="other")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path, variant="other"), model)
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    shard.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{shard.name}' is damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path, variant="other")


@pytest.mark.parametrize("cut", [0, 5, 300, -1])
def test_a_truncated_shard_is_named(cut: int, tmp_path: Path) -> None:
    saved(tmp_path, max_shard_size="2KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:cut])
    with pytest.raises(ValueError, match=rf"{shard.name}' is damaged or no safetensors file"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_index_that_is_none_is_named(tmp_path: Path) -> None:
    saved(tmp_path, max_shard_size="2KB")
    (tmp_path / "model.safetensors.index.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="index.json' is damaged: no JSON with a weight_map"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_tensors_that_are_missing_or_too_many_are_named(tmp_path: Path) -> None:
    """transformers would draw what is missing, with a warning."""
    saved(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    norm = tensors.pop("model.norm.weight")
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks model.norm.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    safetensors.torch.save_file(tensors | {"model.norm.weight": norm, "model.more": norm.clone()}, file)
    with pytest.raises(ValueError, match="has model.more, which this configuration has not"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_weights_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    edit_config(saved(tmp_path), lambda content: content["model"].update(vocab_size=30))
    with pytest.raises(ValueError, match=f"a vocabulary of {VOCAB}, the configuration says 30"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use resize_token_embeddings"):
        AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_weights_of_other_sizes_are_refused(tmp_path: Path) -> None:
    def widen(content: dict[str, Any]) -> None:
        content["model"]["blocks"]["mom"]["mixer"]["head_dim"] = 8

    edit_config(saved(tmp_path), widen)
    with pytest.raises(
        ValueError, match=r"model.blocks.0.mixer.memory_weight must be \[4, 36, 16\].*, is \[4, 20, 16\]"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_configuration_of_another_version_is_refused(tmp_path: Path) -> None:
    edit_config(saved(tmp_path), lambda content: content["model"].update(format=2))
    with pytest.raises(ValueError, match="written by another version of linear-moe; this one reads format 1"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_tokenizer_with_more_tokens_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    for size in (VOCAB - 3, VOCAB):
        words = WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0")
        Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
        assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == VOCAB
    tokenizer = Tokenizer(words)
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=rf"has token {VOCAB}, the model has vocab_size = {VOCAB}.*\({VOCAB + 1}\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
