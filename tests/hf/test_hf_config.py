"""A declaration survives as a Hugging Face configuration, and one that can't be is refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hf_models import declare
from transformers import AutoConfig

from linear_moe.hf import LinearMoEConfig
from linear_moe.models import ConfigError, load_config, shipped_configs


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_configuration_survives_json(name: str, tmp_path: Path) -> None:
    config = LinearMoEConfig(model=name)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LinearMoEConfig
    assert loaded.to_json_string() == config.to_json_string()
    declared = load_config(name)
    assert loaded.declaration() == declared
    assert loaded.declaration().fingerprint() == declared.fingerprint()
    assert loaded.num_hidden_layers == len(declared.layer_names())
    assert (loaded.vocab_size, loaded.hidden_size) == (declared.vocab_size, declared.hidden_size)


def test_a_declaration_may_come_as_an_object_as_data_or_as_a_file(tmp_path: Path) -> None:
    declared = declare("mom full", tie_embeddings=True)
    file = tmp_path / "model.yaml"
    file.write_text(declared.to_yaml(), encoding="utf-8")
    given = [declared, declared.model_dump(mode="json", exclude_unset=True), file]
    configs = [LinearMoEConfig(model=model, pad_token_id=1) for model in given]
    assert configs[0].to_dict() == configs[1].to_dict() == configs[2].to_dict()
    assert configs[0].declaration() == declared
    assert configs[0].tie_word_embeddings is True


def test_what_is_kept_is_plain_data() -> None:
    config = LinearMoEConfig(model=declare("one gla"), pad_token_id=3, dtype="bfloat16")
    assert json.loads(json.dumps(config.model)) == config.model
    again = LinearMoEConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert again.pad_token_id == 3


def changed(**changes: Any) -> dict[str, Any]:
    return LinearMoEConfig(model=declare()).to_dict() | changes


MODEL = LinearMoEConfig(model=declare()).model


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(model=MODEL | {"format": 2}), "model.format: is 2: written by another version.*reads format 1"),
        (changed(model=MODEL | {"hiden_size": 3}), "hiden_size: unknown key; did you mean 'hidden_size'"),
        (changed(model={k: v for k, v in MODEL.items() if k != "layers"}), "layers: is required"),
        (changed(model=MODEL | {"vocab_size": "23"}), "vocab_size: must be a valid integer, got text '23'"),
        (changed(model="no-such-model"), "no-such-model: no such file, nor a shipped configuration"),
        (changed(model=7), "must be a mapping"),
        (changed(use_cashe=True), "use_cashe: unknown key; did you mean 'use_cache'"),
        (changed(vocab_size=5), "vocab_size: belongs to the declaration"),
    ],
)
def test_a_configuration_that_can_not_be_is_refused_in_words(
    content: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        AutoConfig.from_pretrained(tmp_path)


def test_a_configuration_without_a_declaration_is_refused() -> None:
    with pytest.raises(TypeError, match="'model'"):
        LinearMoEConfig()


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path: Path) -> None:
    config = LinearMoEConfig(model=declare())
    config.colour = "red"
    with pytest.raises(ConfigError, match="colour: unknown key"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_another_vocabulary_is_another_declaration() -> None:
    config = LinearMoEConfig(model=declare())
    config.vocab_size = 40
    assert config.declaration() == declare(vocab_size=40)
    with pytest.raises(ConfigError, match="vocab_size: must be greater than 0, got -1"):
        config.vocab_size = -1
