"""`linear-moe convert` as a user types it. What it converts is the business of tests/models/convert."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from linear_moe.cli import app
from linear_moe.models.model_folder import read_model_folder

WIDTH, VOCAB = 8, 11


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A Transformer of one layer."""
    folder = tmp_path / "source"
    folder.mkdir()
    sizes = {"hidden_size": WIDTH, "vocab_size": VOCAB, "num_heads": 2, "num_hidden_layers": 1, "intermediate_size": 6}
    (folder / "config.json").write_text(json.dumps({"model_type": "transformer", "remark": "mine", **sizes}))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embeddings.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCAB, WIDTH),
    }
    layer = {f"attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
    layer |= {"attn_norm.weight": (WIDTH,), "mlp_norm.weight": (WIDTH,), "mlp.down_proj.weight": (WIDTH, 6)}  # type: ignore[dict-item]
    layer |= {"mlp.gate_proj.weight": (6, WIDTH), "mlp.up_proj.weight": (6, WIDTH)}
    shapes |= {f"model.layers.0.{name}": shape for name, shape in layer.items()}
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: Any, says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ") and "Traceback" not in result.output
    assert says in re.sub(r"\s+", " ", result.stderr)


def test_a_checkpoint_becomes_a_model_that_the_other_commands_take(checkpoint: Path, tmp_path: Path) -> None:
    result = run("convert", checkpoint, tmp_path / "ours", "--ignore", "remark")
    assert result.exit_code == 0, result.output
    model = read_model_folder(tmp_path / "ours")
    count = f"{model.num_parameters():,}"
    assert f"transformer: {count} parameters, {count} active a token, in float32; layers attention" in result.stdout
    assert "rounded" not in result.stdout
    assert f"model: {tmp_path / 'ours'}" in result.stdout
    assert run("explain", tmp_path / "ours" / "config.yaml").exit_code == 0
    written = run("generate", tmp_path / "ours", "--prompt", "1 2 3", "--tokens", 4, "--device", "cpu")
    expected = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4)
    assert written.stdout.split() == [str(token) for token in expected[0].tolist()]


def test_what_is_rounded_is_said(checkpoint: Path, tmp_path: Path) -> None:
    result = run("convert", checkpoint, tmp_path / "ours", "--ignore", "remark", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "in bfloat16" in result.stdout
    assert "rounded to bfloat16: blocks.0.ffn.in_proj.weight, blocks.0.ffn.out_proj.weight, " in result.stdout
    assert read_model_folder(tmp_path / "ours").embedding.weight.dtype == torch.bfloat16


def test_mistakes_are_one_line(checkpoint: Path, tmp_path: Path) -> None:
    refused("convert", checkpoint, tmp_path / "ours", says="unknown key remark = 'mine'; if it changes nothing")
    refused("convert", tmp_path / "no", tmp_path / "ours", says="is no folder")
    refused("convert", checkpoint, checkpoint, says="is already there; remove it, or choose another place")
    refused("convert", checkpoint, tmp_path / "ours", "--dtype", "int4", says="dtype must be one of float32, bfloat16")
    refused(
        "convert", checkpoint, tmp_path / "ours", "--ignore", "remrak", says="remrak can't be ignored: there is no such"
    )
    assert run("convert", checkpoint).exit_code == 2
    assert not (tmp_path / "ours").exists()
