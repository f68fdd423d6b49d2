"""LoRA of peft on a model's matrices, those stacked by memory too: only adapters learn, and merged they are the same model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import VOCAB, draw, make
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

# peft asks a model by the older name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LINEAR = ["qkv_proj", "out_proj", "gate_proj", "in_proj", "head"]
TARGETS = {
    "linear": {"target_modules": LINEAR},
    "stacked": {"target_modules": [], "target_parameters": ["mixer.memory_weight"]},
    "all": {"target_modules": LINEAR, "target_parameters": ["mixer.memory_weight", "mixer.token_weight"]},
}


def adapt(model: Any, targets: str) -> Any:
    config = LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **TARGETS[targets])
    return get_peft_model(model, config)


def fit(adapted: Any, steps: int = 6) -> list[float]:
    adapted.train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 0.05)
    tokens = torch.arange(24).view(2, 12) % 5
    losses = []
    for _ in range(steps):
        loss = adapted(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    adapted.eval()
    return losses


@pytest.mark.parametrize("targets", TARGETS)
def test_only_adapters_learn_and_merged_they_are_the_same_model(targets: str, tmp_path: Path) -> None:
    model = make("mom full gla", std=0.2)
    before = copy.deepcopy(model)
    adapted = adapt(model, targets)
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert all(".lora_" in name for name in names)
    tokens = draw()
    torch.testing.assert_close(adapted(tokens).logits, before(tokens).logits)
    losses = fit(adapted)
    assert losses[-1] < losses[0] - 0.1

    bare = {name: p for name, p in adapted.named_parameters() if ".lora_" not in name}
    plain = {name.replace(".base_layer", "").removeprefix("base_model.model."): p for name, p in bare.items()}
    expected = dict(before.named_parameters())
    assert plain.keys() == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(plain[name], parameter), name

    with torch.no_grad():
        logits = adapted(tokens).logits
        assert float((logits - before(tokens).logits).abs().max()) > 0.01
        adapted.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(before, tmp_path).eval()
        torch.testing.assert_close(again(tokens).logits, logits)
        merged = adapted.merge_and_unload()
        if targets == "all":
            # The first time unwraps the mixers, the second what is inside them.
            merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, logits, rtol=1e-4, atol=1e-5)
    assert merged.state_dict().keys() == make("mom full gla").state_dict().keys()


@pytest.mark.parametrize("targets", TARGETS)
def test_an_adapted_model_decodes_on_its_state(targets: str) -> None:
    adapted = adapt(make("mom full gla", std=0.2), targets)
    fit(adapted)
    adapted = adapted.double()
    prompts = draw(2, 4)
    options = {"input_ids": prompts, "max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    assert torch.equal(adapted.generate(**options), adapted.generate(**options, use_cache=False))


def test_each_memory_has_an_adapter_of_its_own() -> None:
    adapted = adapt(make("mom", std=0.2), "stacked")
    fit(adapted)
    (wrapper,) = [part for part in adapted.modules() if getattr(part, "parameter_name", None) == "memory_weight"]
    change = wrapper.get_delta_weight("default")
    assert change.shape == wrapper.get_param().shape
    ranks = [int(torch.linalg.matrix_rank(matrix, rtol=1e-4)) for matrix in change]
    assert ranks == [2] * len(change)
    assert not torch.allclose(change[0], change[1], atol=1e-4)


def test_checkpointing_changes_no_adapters_gradient() -> None:
    adapted = adapt(make("mom full gla", dtype=torch.float64), "all")
    for name, parameter in adapted.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.train()
    tokens, found = draw(), []
    for _ in range(2):
        adapted.zero_grad()
        adapted(input_ids=tokens, labels=tokens).loss.backward()
        found.append({n: p.grad.clone() for n, p in adapted.named_parameters() if p.requires_grad})
        adapted.get_base_model().activation_checkpointing_enable()
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-12)


def test_an_adapters_folder_is_loaded_with_its_model(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make("mom full gla", std=0.2).save_pretrained(base)
    adapted = adapt(AutoModelForCausalLM.from_pretrained(base), "linear")
    fit(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    tokens = draw()
    torch.testing.assert_close(loaded(tokens).logits, adapted(tokens).logits)
    assert loaded(tokens).logits.shape == (2, 9, VOCAB)
