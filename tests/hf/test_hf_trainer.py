"""`Trainer` runs the model: its steps, its accumulation, its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import VOCAB, draw, make
from transformers import Trainer, TrainingArguments

from linear_moe.hf import BalanceBiasCallback, LinearMoEForCausalLM
from linear_moe.layers.auxiliary import set_auxiliary_scale


def train(model: Any, rows: list[torch.Tensor], folder: Path, callbacks: Any = (), **options: Any) -> Trainer:
    """In the order of the rows, with plain gradient descent, so that a step is its gradient."""
    defaults = {
        "output_dir": str(folder),
        "max_steps": 1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 1,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
    }
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(**(defaults | options))
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))
    trainer.train()
    return trainer


def assert_same_parameters(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for (name, p), (_, q) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_it_learns_and_its_checkpoint_goes_on(tmp_path: Path) -> None:
    model = make("mom full", std=0.1)
    rows = [torch.arange(12) % 5 + start for start in range(8)]
    options = {"optim": "adamw_torch", "learning_rate": 0.02, "per_device_train_batch_size": 4}
    trainer = train(model, rows, tmp_path, **options, max_steps=12, save_strategy="steps", save_steps=12)
    assert trainer.state.global_step == 12
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert losses[-1] < 0.5 * losses[0]
    evaluated = trainer.evaluate()["eval_loss"]
    assert evaluated < losses[0]
    (predictions, _, _) = trainer.predict(trainer.eval_dataset)
    assert predictions.shape == (8, 12, VOCAB)
    loaded = LinearMoEForCausalLM.from_pretrained(tmp_path / "checkpoint-12")
    assert_same_parameters(loaded, model)
    train(loaded, rows, tmp_path, **options, max_steps=13)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_count_each_loss_in_its_share(checkpointing: bool, tmp_path: Path) -> None:
    """The same row n times is the same gradient, auxiliary losses included, as the row once."""
    row = draw(1, 9)[0]
    models = []
    for count in (1, 4):
        torch.manual_seed(5)
        model = make("mom one", dtype=torch.float64)
        options = {"gradient_accumulation_steps": count, "activation_checkpointing": checkpointing}
        train(model, [row] * count, tmp_path, **options)
        models.append(model)
    assert_same_parameters(*models)
    torch.manual_seed(5)
    start = make("mom one", dtype=torch.float64)
    router = "model.blocks.0.mixer.router.weight"
    assert not torch.equal(models[0].get_parameter(router), start.get_parameter(router))


def test_a_loss_of_the_users_own_gets_the_auxiliary_losses_attached(tmp_path: Path) -> None:
    """Without labels the model can't know what the loss is divided by: `set_auxiliary_scale` says it."""
    row = draw(1, 9)[0]

    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            return model(input_ids=inputs["input_ids"]).logits.logsumexp(-1).mean() / 2

    models = []
    for count in (1, 2):
        torch.manual_seed(5)
        model = make("mom one", dtype=torch.float64)
        set_auxiliary_scale(model, 1 / count)
        arguments = {"gradient_accumulation_steps": count, "output_dir": str(tmp_path), "max_steps": 1, "optim": "sgd"}
        arguments |= {"per_device_train_batch_size": 1, "report_to": "none", "use_cpu": True, "max_grad_norm": 0.0}
        arguments |= {"learning_rate": 0.1, "lr_scheduler_type": "constant", "save_strategy": "no"}
        arguments |= {"disable_tqdm": True, "dataloader_pin_memory": False}
        data = [{"input_ids": row, "labels": row}] * count
        # This loss takes no count of labels: Trainer divides it by the number of micro-batches.
        trainer = Own(model=model, args=TrainingArguments(**arguments), train_dataset=data)
        trainer.model_accepts_loss_kwargs = False
        trainer.train()
        models.append(model)
    assert_same_parameters(*models)


def test_selection_biases_move_once_a_step(tmp_path: Path) -> None:
    model = make("biased")
    rows = [draw(1, 9)[0] for _ in range(6)]
    train(model, rows, tmp_path, gradient_accumulation_steps=3, max_steps=2)
    bias = model.model.blocks[0].mixer.router.bias
    assert bias.bias.tolist() == [0.0, 0.0, 0.0]
    assert float(bias.pending.sum()) == pytest.approx(6)
    bias.pending.zero_()
    train(model, rows, tmp_path, [BalanceBiasCallback()], gradient_accumulation_steps=3, max_steps=2)
    assert bias.pending.tolist() == [0.0, 0.0, 0.0]
    steps = (bias.bias / bias.rate).round()
    torch.testing.assert_close(bias.bias, steps * bias.rate)
    assert 0 < float(steps.abs().max()) <= 2
