"""Training from captured graphs: the numbers of training call by call."""

from __future__ import annotations

import warnings

import pytest
import torch
from small_models import recall_task, small_config, text_task

from linear_moe.data.batch import Batch
from linear_moe.layers.balance import BalanceBias
from linear_moe.models import LanguageModel, build_model
from linear_moe.training.backward import PlainBackward, Scored
from linear_moe.training.captured import FEWEST_DOCUMENTS, MOST_GRAPHS, CapturedBackward, _filled_up
from linear_moe.training.loop import accumulate_gradients, choose_backward, optimise
from linear_moe.training.optimizer import build_optimizer
from linear_moe.training.settings import TrainSettings
from linear_moe.training.tasks import Task

gpu = pytest.mark.gpu


def _model(vocab_size: int = 257, **options: object) -> LanguageModel:
    torch.manual_seed(5)
    return build_model(small_config(vocab_size, **options), device="cuda")  # type: ignore[arg-type]


def _state(model: LanguageModel) -> dict[str, torch.Tensor]:
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return gradients | {name: buffer.clone() for name, buffer in model.named_buffers()}


def test_a_packed_batch_is_filled_up_with_empty_documents() -> None:
    tokens = torch.arange(9)[None]
    scored = Scored.of(Batch(tokens, tokens, torch.tensor([0, 4, 9])))
    borders = _filled_up(scored).cu_seqlens
    assert borders is not None and borders.tolist() == [0, 4] + [9] * (FEWEST_DOCUMENTS - 1)
    many = torch.arange(12).clamp_max(9)
    assert _filled_up(scored._replace(cu_seqlens=many)).cu_seqlens.numel() == 17  # type: ignore[union-attr]
    assert _filled_up(scored._replace(cu_seqlens=None)).cu_seqlens is None


def test_without_a_gpu_training_runs_call_by_call() -> None:
    model = build_model(small_config())
    assert isinstance(choose_backward(model, TrainSettings()), PlainBackward)


@gpu
@pytest.mark.parametrize("task", [recall_task, text_task])
@pytest.mark.parametrize("parts", [1, 3])
def test_the_same_bits_as_call_by_call(task: type[Task], parts: int) -> None:
    options = {"balance_weight": 0.5, "balance_bias_rate": 0.1}
    models = [_model(**options), _model(**options)]
    backwards = [PlainBackward(models[0], "bfloat16"), CapturedBackward(models[1], "bfloat16")]
    batches = task()
    for step in range(4):
        losses = []
        for model, backward in zip(models, backwards, strict=True):
            model.zero_grad(set_to_none=True)
            step_batches = [batches.batch(parts * step + part) for part in range(parts)]
            losses.append(accumulate_gradients(model, step_batches, backward))
        assert torch.equal(*losses)
        plain, captured = (_state(model) for model in models)
        assert plain.keys() == captured.keys()
        assert all(torch.equal(plain[name], captured[name]) for name in plain)
        for (_, a), (_, b) in zip(*(model.memory_layers() for model in models), strict=True):
            assert a.routing is not None and b.routing is not None
            assert torch.equal(a.routing.load, b.routing.load)
            assert torch.equal(a.routing.indices, b.routing.indices)


@gpu
def test_more_shapes_than_graphs() -> None:
    model = _model()
    backward = CapturedBackward(model, "bfloat16")
    wanted_model = _model()
    for length in (*range(4, 5 + MOST_GRAPHS), 4):
        tokens = torch.randint(257, (2, length))
        for m, b in ((model, backward), (wanted_model, PlainBackward(wanted_model, "bfloat16"))):
            m.zero_grad(set_to_none=True)
            accumulate_gradients(m, [Batch(tokens, tokens)], b)
        came, wanted = _state(model), _state(wanted_model)
        assert all(torch.equal(came[name], wanted[name]) for name in wanted)


@gpu
def test_training_by_graphs_is_training() -> None:
    reports = []
    for capture in (False, True):
        model = _model(balance_bias_rate=0.01)
        settings = TrainSettings(steps=12, learning_rate=1e-2, precision="bfloat16", accumulate=2, capture=capture)
        optimizer = build_optimizer(model, settings)
        reports.append(list(optimise(model, optimizer, text_task(), settings)))
        biases = [part.bias.abs().sum() for part in model.modules() if isinstance(part, BalanceBias)]
        assert all(float(bias) > 0 for bias in biases)
    assert reports[0] == reports[1]


@gpu
def test_what_can_not_be_captured_runs_call_by_call_and_says_so() -> None:
    model, wanted_model = _model(), _model()
    model.blocks[0].mixer.register_forward_hook(lambda module, inputs, output: output * float(output.isfinite().all()))
    backward = CapturedBackward(model, "bfloat16")
    batch = text_task().batch(0)
    with pytest.warns(RuntimeWarning, match="call by call"):
        accumulate_gradients(model, [batch], backward)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.zero_grad(set_to_none=True)
        accumulate_gradients(model, [batch], backward)
    accumulate_gradients(wanted_model, [batch], PlainBackward(wanted_model, "bfloat16"))
    came, wanted = _state(model), _state(wanted_model)
    assert all(torch.equal(came[name], wanted[name]) for name in wanted)
