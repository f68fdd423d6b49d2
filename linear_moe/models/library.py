"""Finding configurations: files, and the ones that come with the package."""

from __future__ import annotations

import os
from pathlib import Path

from linear_moe.models.errors import ConfigError, Problem, choices
from linear_moe.models.schema import ModelConfig

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs"


def shipped_configs() -> list[str]:
    """Names of the configurations that come with the package, sorted."""
    return sorted(file.stem for file in CONFIG_FOLDER.glob("*.yaml"))


def load_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Read a configuration.

    Args:
        path: of a YAML file, or the name of a shipped one, such as "mom-380m". A file that is there goes first.

    Raises:
        ConfigError: if there is no such file or name, or it is no configuration: with the key, what came, what is allowed.
    """
    file, source = Path(path), str(path)
    if not file.exists():
        name = source.removesuffix(".yaml")
        if name not in shipped_configs():
            message = f"no such file, nor a shipped configuration of that name; {choices(name, shipped_configs())}"
            raise ConfigError(source, [Problem("", message)])
        file = CONFIG_FOLDER / f"{name}.yaml"
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(source, [Problem("", f"is not UTF-8 text: byte {error.start} can't be decoded")]) from None
    except OSError as error:
        raise ConfigError(source, [Problem("", f"can't be read: {error.strerror}")]) from None
    return ModelConfig.from_yaml(text, source=source)
