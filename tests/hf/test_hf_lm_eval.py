"""lm-eval's `hf` backend runs a model from a folder, on task data made here."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_models import VOCAB, make
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

pytestmark = pytest.mark.filterwarnings("ignore::Warning")
WORDS = [f"w{index}" for index in range(1, VOCAB)]


def rows() -> list[dict[str, Any]]:
    draw = random.Random(0)
    made = []
    for length in (3, 6, 2, 5):
        question, choices = draw.choices(WORDS, k=length), [draw.choices(WORDS, k=count) for count in (1, 2, 3)]
        text = [" ".join(choice) for choice in choices]
        made.append({"question": " ".join(question), "choices": text, "answer": draw.randrange(3)})
    return made


def data(**_: Any) -> Any:
    from datasets import Dataset, DatasetDict

    return DatasetDict({"test": Dataset.from_list(rows())})


def save(folder: Path) -> Any:
    words = WordLevel({"</s>": 0} | {word: index for index, word in enumerate(WORDS, 1)}, unk_token="</s>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>").save_pretrained(folder)
    model = make("mom full")
    model.save_pretrained(folder)
    return model


def evaluate(folder: Path, **task: Any) -> Any:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    common = {"custom_dataset": data, "test_split": "test", "doc_to_text": "{{question}}"}
    backend = HFLM(pretrained=str(folder), device="cpu", batch_size=3)
    # Without the thousands of tasks that come with lm-eval: listing them takes most of a minute.
    own = TaskManager(include_defaults=False)
    result = lm_eval.simple_evaluate(
        backend, tasks=[common | task], task_manager=own, bootstrap_iters=0, confirm_run_unsafe_code=True, num_fewshot=0
    )
    return result["samples"][task["task"]]


def test_choices_are_scored_as_the_model_scores_them(tmp_path: Path) -> None:
    model = save(tmp_path)
    samples = evaluate(
        tmp_path,
        task="made_choices",
        output_type="multiple_choice",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        metric_list=[{"metric": "acc"}],
    )
    assert len(samples) == 4
    for sample in samples:
        row = sample["doc"]
        question = [WORDS.index(word) + 1 for word in row["question"].split()]
        for choice, (found, _) in zip(row["choices"], sample["filtered_resps"], strict=True):
            answer = [WORDS.index(word) + 1 for word in choice.split()]
            with torch.no_grad():
                scores = F.log_softmax(model(torch.tensor([question + answer])).logits[0], -1)
            steps = range(len(question) - 1, len(question) + len(answer) - 1)
            expected = sum(float(scores[t, token]) for t, token in zip(steps, answer, strict=True))
            assert float(found) == pytest.approx(expected, abs=1e-4)


def test_answers_are_generated_as_the_model_generates_them(tmp_path: Path) -> None:
    model = save(tmp_path)
    samples = evaluate(
        tmp_path,
        task="made_answers",
        output_type="generate_until",
        doc_to_target="{{choices[0]}}",
        generation_kwargs={"until": ["</s>"], "max_gen_toks": 4, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )
    assert len(samples) == 4
    for sample in samples:
        question = torch.tensor([[WORDS.index(word) + 1 for word in sample["doc"]["question"].split()]])
        new = model.model.generate(question, max_new_tokens=4)[0, question.shape[1] :].tolist()
        stop = new.index(0) if 0 in new else len(new)
        assert sample["filtered_resps"][0].split() == [WORDS[token - 1] for token in new[:stop]]
