"""The recall study: that designs are treated alike, and that its words claim no more than its numbers."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from rich.console import Console
from small_models import PROBLEM, small_config

from linear_moe.data.mqar import MQAR
from linear_moe.training.demo.recall_report import plot_study, study_remarks, study_table, write_csv
from linear_moe.training.demo.recall_study import (
    TUNING_SEED,
    DesignSummary,
    RecallResult,
    Study,
    StudySize,
    best_rate,
    compared,
    run_recall_job,
    run_study,
    study_jobs,
    tuning_jobs,
)
from linear_moe.training.demo.sizes import DESIGNS, demo_size
from linear_moe.training.settings import TrainSettings

EASIER = MQAR(vocab_size=16, length=8, num_pairs=1)


def _size() -> StudySize:
    return StudySize(
        problem=PROBLEM,
        practice=(EASIER,),
        designs={"few": small_config(num_memories=3), "many": small_config(num_memories=4)},
        settings=TrainSettings(steps=4),
        learning_rates=(1e-3, 1e-2),
        num_seeds=2,
        batch_size=2,
        held_out_size=4,
    )


def _summary(design: str, accuracies: list[float], curve: list[tuple[int, float]] | None = None) -> DesignSummary:
    results = [
        RecallResult(design, seed, 1e-2, accuracy, curve or [(100, accuracy)], 1.0, 10, 4, 8, diverged=False)
        for seed, accuracy in enumerate(accuracies)
    ]
    return DesignSummary(design, 1e-2, results)


def test_designs_differ_in_nothing_but_their_configuration_and_rate() -> None:
    size = _size()
    jobs = study_jobs(size, {"few": 1e-3, "many": 1e-2}, "cpu")
    assert {(job.design, job.settings.seed, job.settings.learning_rate) for job in jobs} == {
        (design, seed, rate) for design, rate in (("few", 1e-3), ("many", 1e-2)) for seed in (0, 1)
    }
    assert (
        len(
            {(job.problem, job.practice, job.batch_size, job.settings.steps, job.settings.weight_decay) for job in jobs}
        )
        == 1
    )
    tuning = tuning_jobs(size, "cpu")
    assert {(job.design, job.settings.learning_rate) for job in tuning} == {
        (design, rate) for design in size.designs for rate in size.learning_rates
    }
    assert {job.settings.seed for job in tuning} == {TUNING_SEED}
    assert TUNING_SEED not in {job.settings.seed for job in jobs}
    assert tuning[0].design == jobs[0].design == "many"


def test_a_study_from_end_to_end(tmp_path: Path) -> None:
    size, seen = _size(), []
    study = run_study(size, workers=1, device="cpu", on_steps=lambda *progress: seen.append(progress))
    assert [design.design for design in study.designs] == ["few", "many"]
    assert all(len(design.results) == 2 for design in study.designs)
    assert all(len({result.seed for result in design.results}) == 2 for design in study.designs)
    assert (seen[0], seen[-1]) == (("tuning the learning rates", 0, 16), ("the study", 16, 16))

    console = Console(file=io.StringIO(), width=150)
    console.print(study_table(study))
    for remark in study_remarks(study, size):
        console.print(remark)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for design in study.designs:
        assert f"{design.mean:.3f} ± {design.deviation:.3f}" in text
    write_csv(study, tmp_path / "runs.csv")
    with (tmp_path / "runs.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["phase"] for row in rows] == ["tuning"] * 4 + ["study"] * 4
    plot_study(study, tmp_path / "runs.png")
    assert "3 pairs in 16 tokens" in text
    assert "1 pairs in 8" in text
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_job_gives_the_same_result() -> None:
    job = study_jobs(_size(), {"few": 1e-2, "many": 1e-2}, "cpu")[0]
    first, second = (run_recall_job(job, lambda units: None) for _ in range(2))
    assert first._replace(seconds=0) == second._replace(seconds=0)


def test_a_run_that_diverges_is_counted_as_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    job = study_jobs(_size(), {"few": 1e-2, "many": 1e-2}, "cpu")[0]
    wild = job._replace(settings=TrainSettings(steps=4, learning_rate=1e30, gradient_clip=1e30))
    done: list[int] = []
    result = run_recall_job(wild, done.append)
    assert result.diverged
    assert sum(done) == 4
    study = Study([_summary("a", [0.5])._replace(results=[result])], [], 0.0)
    assert any("diverged" in remark for remark in study_remarks(study, _size()))


def test_the_best_rate_is_the_smaller_of_two_alike() -> None:
    results = _summary("a", [0.5, 0.9, 0.9]).results
    rates = (1e-3, 1e-2, 3e-3)
    assert best_rate([r._replace(learning_rate=rate) for r, rate in zip(results, rates, strict=True)]) == 3e-3


def test_words_follow_numbers() -> None:
    low, high, wide = _summary("low", [0.1, 0.2]), _summary("high", [0.8, 0.9]), _summary("wide", [0.15, 0.95])
    assert compared(high, low).startswith("high is 0.700 above low on average")
    assert "no seed of one reaches a seed of the other" in compared(low, high)
    assert compared(low, high).startswith("low is 0.700 below high")
    assert "could be chance" in compared(wide, low)
    assert _summary("one", [0.5]).deviation == 0.0


def test_what_is_still_learning_is_said() -> None:
    climbing = _summary("a", [0.9], curve=[(50, 0.1), (80, 0.5), (100, 0.9)])
    flat = _summary("b", [0.9], curve=[(50, 0.1), (80, 0.89), (100, 0.9)])
    low = _summary("c", [0.2])
    assert (climbing.late_gain, flat.late_gain) == (pytest.approx(0.4), pytest.approx(0.01))
    remarks = list(study_remarks(Study([climbing, flat, low], [], 0.0), _size()))
    said = {remark[0]: remark for remark in remarks if remark[1:3] == ": "}
    assert "still learning" in said["a"]
    assert "still learning" not in said["b"]
    assert "edge" in said["b"]
    assert "hardly learned" in said["c"]
    assert "hardly learned" not in said["a"]


@pytest.mark.parametrize("name", ["quick", "cpu", "gpu"], ids="size {}".format)
def test_sizes_compare_a_memory_with_three_times_as_much_state(name: str) -> None:
    study = demo_size(name).study
    assert list(study.designs) == list(DESIGNS)
    mixers = [config.blocks["memory"].mixer for config in study.designs.values()]
    single, wide, mixture = (mixer.rule_dims(study.designs["mixture"].hidden_size) for mixer in mixers)  # type: ignore[union-attr]
    assert wide.head_value_dim == 3 * single.head_value_dim == 3 * mixture.head_value_dim
    assert single.head_dim == wide.head_dim == mixture.head_dim
    assert all(config.vocab_size == study.problem.vocab_size for config in study.designs.values())
    assert all(config.vocab_size == easier.vocab_size for config in study.designs.values() for easier in study.practice)
    assert name == "quick" or study.num_seeds >= 3


def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match="size must be one of auto, quick, cpu, gpu, got 'huge'"):
        demo_size("huge")
