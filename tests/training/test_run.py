"""Runs: that they can be stopped and gone on with, without a trace of it in the numbers."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import pytest
import torch
from small_models import small_config
from small_tokenizer import VOCABULARY, write_tokenizer

from linear_moe.training.checkpoint import find_checkpoint, load_model
from linear_moe.training.divergence import DivergedError
from linear_moe.training.loop import StepReport
from linear_moe.training.metrics import read_metrics
from linear_moe.training.plan import RunPlan, TaskOptions
from linear_moe.training.run import Run, resume_run, start_run
from linear_moe.training.settings import TrainSettings

STEPS = 8


class Watcher:
    """A display that may send Ctrl-C to its own process."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.interrupt_at = interrupt_at
        self.steps: list[int] = []

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def evaluated(self, step: int, scores: Mapping[str, float]) -> None: ...

    def update(self, report: StepReport) -> None:
        self.steps.append(report.step)
        if report.step == self.interrupt_at:
            signal.raise_signal(signal.SIGINT)


def _start(folder: Path, *, steps: int = STEPS, **plan: int) -> Run:
    options = TaskOptions(task="mqar", problems=("16:3",), batch_size=4)
    settings = TrainSettings(steps=steps, accumulate=2, learning_rate=1e-2)
    return start_run(small_config(balance_bias_rate=0.01), RunPlan(options, settings, log_every=1, **plan), folder)


def _start_on_text(folder: Path, source: Path, streamed: bool) -> Run:
    """Rows of JSON lines, read into memory or streamed, through a tokeniser."""
    if not source.exists():
        (source / "rows").mkdir(parents=True)
        rows = [{"text": f"the {colour} fox jumps over {n} dogs"} for n in range(30) for colour in ("brown", "lazy")]
        (source / "rows" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_tokenizer(source / "tokenizer.json")
    where = {"dataset" if streamed else "data": str(source / "rows")}
    tokenizer = str(source / "tokenizer.json")
    options = TaskOptions(**where, tokenizer=tokenizer, context=8, batch_size=2, held_out_documents=3)  # type: ignore[arg-type]
    plan = RunPlan(options, TrainSettings(steps=STEPS, accumulate=2, learning_rate=1e-2), log_every=1)
    return start_run(small_config(VOCABULARY), plan, folder)


def _losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def test_a_run_leaves_metrics_a_checkpoint_a_score_and_a_sample(tmp_path: Path) -> None:
    outcome = _start(tmp_path, evaluate_every=4).train(Watcher())
    assert (outcome.step, outcome.interrupted) == (STEPS, False)
    assert 0 <= outcome.scores["accuracy"] <= 1
    assert outcome.sample is not None
    assert (tmp_path / "sample.txt").read_text() == outcome.sample + "\n"
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert all(line["tokens_per_second"] > 0 and len(line["routing"]) == 1 for line in lines if "loss" in line)
    assert [line["step"] for line in lines if "held_out" in line] == [4, 8, 8]
    assert lines[-1] == {"step": 8, "held_out": outcome.scores, "final": True}
    assert outcome.checkpoint == find_checkpoint(tmp_path)


@pytest.mark.parametrize("data", ["recall", "text", "stream"])
def test_going_on_after_ctrl_c_is_as_if_it_had_not_been(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))

    def start(folder: Path) -> Run:
        return _start(folder) if data == "recall" else _start_on_text(folder, tmp_path / "source", data == "stream")

    whole = start(tmp_path / "whole")
    whole.train(Watcher())

    handler = signal.getsignal(signal.SIGINT)
    stopped = start(tmp_path / "parts")
    outcome = stopped.train(Watcher(interrupt_at=3))
    assert (outcome.step, outcome.interrupted, outcome.scores) == (3, True, {})
    assert signal.getsignal(signal.SIGINT) == handler
    load_model(outcome.checkpoint)

    if data != "recall":
        # A checkpoint has its own.
        (tmp_path / "source" / "tokenizer.json").unlink()
    resumed = resume_run(tmp_path / "parts")
    assert resumed.notes == ()
    watcher = Watcher()
    assert not resumed.train(watcher).interrupted
    assert watcher.steps == [4, 5, 6, 7, 8]
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_ctrl_c_in_the_last_step_is_no_interruption(tmp_path: Path) -> None:
    outcome = _start(tmp_path).train(Watcher(interrupt_at=STEPS))
    assert not outcome.interrupted
    assert outcome.scores


def test_a_crash_between_checkpoints_goes_on_from_the_last(tmp_path: Path) -> None:
    run = _start(tmp_path, checkpoint_every=2)

    class Crash(Watcher):
        def update(self, report: StepReport) -> None:
            if report.step == 5:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run.train(Crash())
    resumed = resume_run(tmp_path)
    assert resumed.step == 4
    resumed.train(Watcher())
    assert [step for step, _ in _losses(tmp_path)] == list(range(1, STEPS + 1))


def test_a_run_may_be_made_longer(tmp_path: Path) -> None:
    _start(tmp_path, steps=3).train(Watcher())
    with pytest.raises(ValueError, match="has done 3 of 3 steps: nothing is left"):
        resume_run(tmp_path)
    longer = resume_run(tmp_path, steps=5)
    assert longer.train(Watcher()).step == 5


def test_what_was_left_to_do_after_the_last_step_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _start(tmp_path, steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(run.task, "sample", lambda model: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.train(Watcher())
    resumed = resume_run(tmp_path)
    watcher = Watcher()
    outcome = resumed.train(watcher)
    assert (resumed.step, watcher.steps) == (2, [])
    assert outcome.scores
    assert (tmp_path / "sample.txt").exists()
    with pytest.raises(ValueError, match="nothing is left"):
        resume_run(tmp_path)


def test_what_may_change_the_last_bits_is_said(tmp_path: Path) -> None:
    _start(tmp_path, steps=1).train(Watcher())
    assert resume_run(tmp_path, steps=2).notes == ()
    (note,) = resume_run(tmp_path, steps=2, impl="recurrent").notes
    assert note.endswith("impl was auto, is recurrent")


def test_a_step_that_can_not_be_repeated_is_named(tmp_path: Path) -> None:
    run = _start(tmp_path)
    run.plan = replace(run.plan, settings=replace(run.plan.settings, deterministic=True))

    class Watching(Watcher):
        def update(self, report: StepReport) -> None:
            assert torch.are_deterministic_algorithms_enabled()
            if report.step == 2:
                raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but ...")

    with pytest.raises(ValueError, match=r"deterministic: torch has no such algorithm .* cumsum_cuda_kernel"):
        run.train(Watching())
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_text_that_has_changed_is_said(tmp_path: Path) -> None:
    _start_on_text(tmp_path / "run", tmp_path / "source", streamed=False).train(Watcher(interrupt_at=2))
    with (tmp_path / "source" / "rows" / "a.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n' * 30)
    (note,) = resume_run(tmp_path / "run").notes
    assert "is not what the run began with" in note


def test_divergence_leaves_the_checkpoints_so_far(tmp_path: Path) -> None:
    run = _start(tmp_path, checkpoint_every=2)

    class Poison(Watcher):
        def update(self, report: StepReport) -> None:
            if report.step == 3:
                with torch.no_grad():
                    run.model.norm.weight.fill_(float("nan"))

    with pytest.raises(DivergedError, match=r"step 4: .* that of norm, .*is in .*diverged-step-00000004\.pt"):
        run.train(Poison())
    saved = torch.load(tmp_path / "diverged-step-00000004.pt", weights_only=True)
    assert torch.equal(saved["batches"][1]["tokens"], run.task.batch(7).tokens)
    assert find_checkpoint(tmp_path).name == "step-00000002"


def test_a_folder_holds_one_run(tmp_path: Path) -> None:
    _start(tmp_path, steps=1).train(Watcher())
    with pytest.raises(ValueError, match="already holds a run; go on with it"):
        _start(tmp_path)
    with pytest.raises(ValueError, match="is a checkpoint; --resume takes the run's folder"):
        resume_run(find_checkpoint(tmp_path))
    with pytest.raises(ValueError, match="neither a checkpoint"):
        resume_run(tmp_path / "nothing")
