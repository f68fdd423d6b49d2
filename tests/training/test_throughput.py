"""Utilisation: the model's arithmetic over the device's peak."""

from __future__ import annotations

import pytest
import torch
from small_models import small_config

from linear_moe.models import explain
from linear_moe.training.throughput import Speed, Utilisation, peak_flops


def test_what_is_not_training_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 11.0, 12.0, 14.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    speed = Speed()
    speed.add(100)
    with speed.paused():
        pass
    assert speed.restart() == 50.0
    speed.add(30)
    assert speed.restart() == 15.0


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H200", "bfloat16", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5e12),
        ("NVIDIA L40S", "bfloat16", 362e12),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("cpu", "float32", None),
    ],
)
def test_peaks_are_found_by_name(name: str, precision: str, peak: float | None) -> None:
    assert peak_flops(name, precision) == peak


def test_utilisation_is_three_forward_passes_over_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    config, cpu = small_config(), torch.device("cpu")
    assert Utilisation(config, 64, cpu, "float32").of(1000.0) is None
    monkeypatch.setattr("linear_moe.training.throughput.peak_flops", lambda name, precision: 1e9)
    wanted = 3 * explain(config, context=64).flops_per_token * 1000 / 2e9
    assert Utilisation(config, 64, cpu, "float32", num_devices=2).of(1000.0) == pytest.approx(wanted)
