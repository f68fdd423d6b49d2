"""A checkpoint's model, and what its tokens stand for."""

from __future__ import annotations

from pathlib import Path

import torch

from linear_moe.data.tokenizer import BYTES, load_tokenizer
from linear_moe.data.tokenizer_vocabulary import TokenizerVocabulary
from linear_moe.data.vocabulary import Vocabulary, vocabulary_of
from linear_moe.models.model import LanguageModel
from linear_moe.training.checkpoint import find_checkpoint, read_model


def load_with_vocabulary(
    checkpoint: Path, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[LanguageModel, Vocabulary]:
    """The model in evaluation mode; the vocabulary by the checkpoint's tokeniser, or else by its size.

    Raises:
        ValueError: as `load_model`; or if the model is not of the tokeniser's size.
    """
    folder = find_checkpoint(checkpoint)
    model = read_model(folder, device=device).to(dtype).eval()
    tokenizer = load_tokenizer(folder)
    if tokenizer is BYTES:
        return model, vocabulary_of(model.config.vocab_size)
    tokenizer.check_model(model.config.vocab_size, model.config.name or "the model")
    return model, TokenizerVocabulary(tokenizer)
