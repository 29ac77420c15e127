"""A stock TRL GRPOTrainer, and one line that puts it on our kernels. Needs `pip install trl`.

    python examples/drop_in_trl.py

Trains a tiny random Qwen2 twice for five steps, without and with the line, and prints both.
"""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from regrpo_kernels.compat.trl import patch_grpo_trainer

WORDS = ["<pad>", "</s>", *(f"w{i}" for i in range(10))]


def make_trainer(folder: str) -> GRPOTrainer:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, "<pad>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>"
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=lambda completion_ids, **_: [float(ids.count(2)) for ids in completion_ids],
        args=GRPOConfig(
            output_dir=folder,
            max_steps=5,
            per_device_train_batch_size=8,
            num_generations=8,
            max_completion_length=8,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["w1 w2", "w3", "w4 w5 w6", "w7"]}),
        processing_class=tokenizer,
    )


def main() -> None:
    histories = []
    for patched in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(folder)
            if patched:
                patch_grpo_trainer(trainer)  # the line
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            histories.append([x for x in trainer.state.log_history if "reward" in x])
    for name in ("loss", "grad_norm", "entropy", "reward"):
        for title, history in zip(("stock", "ours"), histories, strict=True):
            print(f"{name:10}{title:6}", *(f"{float(entry[name]):10.6f}" for entry in history))


if __name__ == "__main__":
    main()
