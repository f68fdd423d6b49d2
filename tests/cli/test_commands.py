"""The commands as a user types them: output, exit codes, and no traceback for a mistake."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_tokenizer import write_tokenizer
from typer.testing import CliRunner, Result

import linear_moe
from linear_moe.cli import app
from linear_moe.models import json_schema, load_config
from linear_moe.rules import UpdateRule, register_rule, registry, rule_names
from linear_moe.training.metrics import read_metrics

RECALL = ("train", "recall-mom", "--task", "mqar", "--problem", "16:3", "--batch-size", "4", "--device", "cpu")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: str | Path, says: str) -> None:
    """Exit code 1 and one message on stderr, that reads `says`."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    assert says in re.sub(r"\s+", " ", result.stderr)


def test_help_of_every_command_has_an_example() -> None:
    text = run("--help").output
    commands = [
        "rules",
        "explain",
        "train",
        "generate",
        "eval",
        "inspect",
        "convert",
        "demo",
        "doctor",
        "tune",
        "config-schema",
    ]
    for command in commands:
        assert command in text
        shown = run(command, "--help")
        assert shown.exit_code == 0
        assert f"Example: linear-moe {command}" in shown.output
    assert linear_moe.__version__ in run("--version").output
    assert run("no-such-command").exit_code == 2
    assert run("train", "--no-such-option").exit_code == 2


def test_rules_lists_the_registry() -> None:
    rules = json.loads(run("rules", "--json").stdout)
    assert [rule["name"] for rule in rules] == rule_names()
    gated = next(rule for rule in rules if rule["name"] == "gated_deltanet")
    assert (gated["decay"], gated["erase"]) == ("scalar", "delta")
    assert {"chunked", "recurrent"} <= set(gated["implementations"])
    assert {option["name"] for option in gated["options"]} == {"allow_negative_eigenvalues", "short_conv"}
    table = run("rules").stdout
    assert all(name in table for name in rule_names())


def test_rules_and_doctor_take_a_rule_that_has_only_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))

    @register_rule("only_a_step")
    @dataclass(frozen=True)
    class OnlyAStep(UpdateRule):
        """S_t = S_{t-1} / 2 + k_t v_t^T."""

        def step(self, state, token):  # type: ignore[no-untyped-def]
            state = state / 2 + token.k[..., :, None] * token.v[..., None, :]
            return state, (token.q[..., None, :] @ state).squeeze(-2)

    described = next(rule for rule in json.loads(run("rules", "--json").stdout) if rule["name"] == "only_a_step")
    assert described["implementations"] == ["recurrent"]
    assert "slow" in described["note"]
    checked = run("doctor")
    assert checked.exit_code == 0
    assert "two parts = whole" in checked.stdout


def test_doctor_finds_a_rule_that_declares_what_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("doctor").exit_code == 0
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    monkeypatch.setattr(registry, "_plugins_loaded", True)

    @register_rule("liar")
    @dataclass(frozen=True)
    class Liar(UpdateRule):
        """Declares no decay, and decays."""

        form = linear_moe.Recurrence()

        def step(self, state, token):  # type: ignore[no-untyped-def]
            state = state / 2 + token.k[..., :, None] * token.v[..., None, :]
            return state, (token.q[..., None, :] @ state).squeeze(-2)

    result = run("doctor")
    assert result.exit_code == 1
    assert "WRONG" in result.stdout
    assert "1 of" in result.stdout


def test_explain_and_config_schema() -> None:
    explained = json.loads(run("explain", "mom-380m", "--json").stdout)
    assert explained["parameters"] == 545_119_424
    assert "545,119,424" in run("explain", "mom-380m").stdout
    assert json.loads(run("config-schema").stdout) == json_schema()
    refused("explain", "mom-380", says="did you mean 'mom-380m'?")


def test_explain_names_the_key_that_is_wrong(tmp_path: Path) -> None:
    text = "hidden_size: 8\nvocab_size: 9\nblocks:\n  m: {mixer: {type: mom, num_memory: 4}}\nlayers: m\n"
    (tmp_path / "a.yaml").write_text(text)
    refused("explain", tmp_path / "a.yaml", says="blocks.m.mixer")


def test_train_generate_and_go_on(tmp_path: Path) -> None:
    result = run(*RECALL, "--steps", "3", "--log-every", "1", "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "held-out accuracy: 0." in result.stdout
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 3]
    written = run("generate", tmp_path / "run", "--prompt", "1 33, 2", "--tokens", "2")
    assert written.exit_code == 0
    assert re.fullmatch(r"1 33 2 \d+ \d+\n", written.stdout)
    longer = run("train", "--resume", tmp_path / "run", "--steps", "5")
    assert longer.exit_code == 0, longer.output
    assert "step-00000005" in longer.stdout

    refused("train", "--resume", tmp_path / "run", says="has done 5 of 5 steps")
    refused("train", "--resume", tmp_path / "run", "--seed", "1", says="--seed can't be given with --resume")
    refused("train", "recall-mom", "--resume", tmp_path / "run", says="CONFIG can't be given with --resume")
    refused(*RECALL, "--output", tmp_path / "run", says="already holds a run")
    refused("generate", tmp_path / "run", "--prompt", "1 x", says="'x' in the prompt is none")
    refused("generate", tmp_path / "run", says="needs at least one")
    refused("generate", tmp_path / "run", "--prompt", "99", says="tokens must be in [0, vocab_size = 64), got 99")


def _folder_of(file: Path) -> Path:
    """A folder with a copy of the file alone."""
    folder = file.with_name(f"{file.stem}-alone")
    folder.mkdir()
    return Path(shutil.copy(file, folder)).parent


def test_train_on_text_and_write_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "a.txt").write_text("the quick brown fox\n" * 50)
    config = tmp_path / "tiny.yaml"
    config.write_text(
        "hidden_size: 8\nvocab_size: 257\n"
        "blocks: {m: {mixer: {type: memory, num_heads: 1, head_dim: 4}, ffn: {type: none}}}\nlayers: m\n"
    )
    train = ("train", config, "--steps", "2", "--batch-size", "2", "--length", "8", "--device", "cpu")
    result = run(*train, "--data", tmp_path / "a.txt", "--output", tmp_path / "run", "--threads", "1")
    assert result.exit_code == 0, result.output
    assert "held-out bits per byte:" in result.stdout
    assert "unigram" in result.stdout
    assert load_config(tmp_path / "run" / "checkpoints" / "step-00000002" / "config.yaml") == load_config(config)
    written = run("generate", tmp_path / "run", "--prompt", "the", "--tokens", "4", "--temperature", "0.5")
    assert written.stdout.startswith("the")

    config.write_text(config.read_text().replace("257", "280"))
    (tmp_path / "rows.jsonl").write_text('{"body": "the quick brown fox"}\n' * 200)
    for source in ("--data", "--dataset"):
        tokens = ("--tokenizer", write_tokenizer(tmp_path / "tokenizer.json"), "--text-key", "body")
        where = tmp_path / "rows.jsonl" if source == "--data" else _folder_of(tmp_path / "rows.jsonl")
        result = run(*train, source, where, *tokens, "--output", tmp_path / f"run{source}")
        assert result.exit_code == 0, result.output
        assert "held-out perplexity:" in result.stdout
    config.write_text(config.read_text().replace("280", "257"))

    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    other = (*train, "--output", tmp_path / "other")
    refused(*other, "--data", tmp_path / "bad.txt", says="byte 0xff at offset 2")
    refused(*other, "--data", tmp_path / "empty.txt", says="is empty")
    refused(*other, "--data", tmp_path / "missing", says="neither a file nor a folder")
    refused(*other, "--data", tmp_path / "folder", says="has no file named like text")
    refused(*other, "--pattern", "*.txt", says="--pattern would be ignored")
    refused(*other, "--text-key", "body", says="--text-key would be ignored: it belongs to rows")
    refused(*other, "--data", tmp_path / "a.txt", "--text-key", "body", says="has no rows")
    refused(*other, "--data", "x", "--dataset", "y", says="can't both be what is learned from")
    refused(*other, "--dataset", "y", "--held-out", "0.1", says="--held-out would be ignored")
    refused(*other, "--split", "train", says="--split would be ignored: it belongs to --dataset")
    refused(
        *other, "--document-start", "<s>", says="--document-start would be ignored: it names a token of --tokenizer"
    )
    refused(*other, "--tokenizer", tmp_path / "a.txt", says="is no tokenizer.json")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    refused(*other, "--data", tmp_path / "rows.jsonl", says="row 2 of")
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    refused(*other, "--tokenizer", tokenizer, says="vocab_size of the model is 257, but the tokeniser")
    refused(*other, "--problem", "16:2", says="--problem would be ignored: it belongs to --task mqar, not text")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train"], "train needs a CONFIG"),
        (["train", "recall-mom"], "vocab_size of recall-mom must be 257 for text"),
        (["train", "recall-mom", "--task", "chess"], "task must be one of mqar, text, got 'chess'"),
        ([*RECALL[:4], "--problem", "16"], "LENGTH:PAIRS"),
        ([*RECALL[:4], "--steps", "0"], "steps must be at least 1, got 0"),
        ([*RECALL[:4], "--decay", "0.1"], "--decay would be ignored: it belongs to --schedule wsd, not cosine"),
        ([*RECALL[:4], "--schedule", "wsd", "--decay", "0"], "decay is a fraction"),
        ([*RECALL[:4], "--gradient-clip", "0"], "gradient_clip must be above 0"),
        ([*RECALL[:4], "--log", "paper"], "log must be one of tensorboard, trackio, got 'paper'"),
        ([*RECALL[:4], "--data", "x"], "--data would be ignored"),
        ([*RECALL[:4], "--device", "tpu9"], "device must be auto, cpu, cuda or cuda:N, got 'tpu9'"),
        ([*RECALL[:4], "--device", "cuda:99"], "device 'cuda:99' is not on this machine"),
        ([*RECALL[:4], "--threads", "0"], "threads must be at least 1"),
        (["generate", "nowhere"], "neither a checkpoint"),
        (["demo", "--size", "huge"], "size must be one of"),
        (["demo", "--size", "quick", "--workers", "0"], "workers must be at least 1"),
    ],
)
def test_mistakes_are_explained(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(*arguments, says=says)
    assert not list(tmp_path.iterdir())


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("--debug", "explain", "nothing")
    assert isinstance(result.exception, ValueError)
    monkeypatch.setenv("LINEAR_MOE_DEBUG", "1")
    assert isinstance(run("explain", "nothing").exception, ValueError)
    monkeypatch.delenv("LINEAR_MOE_DEBUG")
    refused("explain", "nothing", says="nothing")


def test_a_missing_package_is_named_before_anything_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused("demo", "--output", tmp_path / "out", says="pip install 'linear-moe[plot]'")
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    refused(*RECALL, "--output", tmp_path / "out", says="pip install 'linear-moe[train]'")


def test_the_demo_from_end_to_end(tmp_path: Path) -> None:
    # What an earlier demo left is replaced.
    (tmp_path / "out" / "text").mkdir(parents=True)
    (tmp_path / "out" / "text" / "metrics.jsonl").write_text('{"step": 1}\n')
    result = run("demo", "--size", "quick", "--workers", "1", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for words in ("mean ± sd", "one, widened", "held-out text:", "layer 0: memory 0:"):
        assert words in result.stdout
    made = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"recall.csv", "recall.png", "memories.png", "memories.txt", "text/sample.txt"} <= made
