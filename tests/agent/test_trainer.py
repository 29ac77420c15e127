"""Runs: SFT, RL and pretraining end to end on tiny models."""

import pytest
import torch
from peft import PeftModel
from runs import metrics_of, rl_config, same, sft_config, state_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from regrpo.config import LoraSettings, OptimConfig, PretrainConfig, SourceConfig
from regrpo.errors import RunError
from regrpo.pretrain import run_pretrain
from regrpo.rl import run_rl
from regrpo.sft import run_sft
from regrpo.trainer import build_optimizer, learning_rate


def test_a_gradient_that_is_not_finite_ends_the_run_and_leaves_the_checkpoint(base, tmp_path):
    optim = OptimConfig(lr=1e30, warmup_steps=0)
    config = sft_config(base, tmp_path, optim=optim, save_every=1)
    with pytest.raises(
        RunError, match=r"step 1: gradient norm is nan; the last checkpoint in .*intact"
    ):
        run_sft(config)
    assert [line["step"] for line in metrics_of(tmp_path)] == [0]
    state = state_of(tmp_path)
    assert state["step"] == 1
    assert all(v.isfinite().all() for v in state["model"].values())
    assert not (tmp_path / "model").exists()


def test_sft_learns_and_its_model_loads_by_itself(base, tmp_path):
    random = str(base / "random")
    config = sft_config(base, tmp_path, model=random, steps=40, optim=OptimConfig(lr=1e-2))
    path = run_sft(config)
    losses = [line["loss"] for line in metrics_of(tmp_path)]
    assert losses[-1] < 0.5 * losses[0]
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.chat_template
    for name, value in state_of(tmp_path)["model"].items():
        assert torch.equal(model.get_parameter(name), value), name
    line = metrics_of(tmp_path)[0]
    assert 0 < line["trained_tokens"] < line["tokens"] <= 1500
    assert any((tmp_path / "tensorboard").iterdir())


def test_an_adapter_loads_with_plain_peft(base, tmp_path):
    path = run_sft(sft_config(base, tmp_path, lora=LoraSettings(rank=2)))
    plain = AutoModelForCausalLM.from_pretrained(base / "model")
    adapted = PeftModel.from_pretrained(plain, path)
    ours = state_of(tmp_path)["model"]
    assert ours
    theirs = dict(adapted.named_parameters())
    for name, value in ours.items():
        assert "lora_" in name
        assert torch.equal(theirs[name], value), name
    assert any((v != 0).any() for n, v in ours.items() if "lora_B" in n)
    assert AutoTokenizer.from_pretrained(path).chat_template


def test_rl_reports_the_usual_names(base, tmp_path, environment):
    run_rl(rl_config(base, tmp_path, steps=2), environment)
    names = set(metrics_of(tmp_path)[0])
    assert names >= {
        "loss",
        "kl",
        "entropy",
        "clip_ratio/low_mean",
        "clip_ratio/high_mean",
        "ratio/mean",
        "reward/mean",
        "reward/std",
        "success",
        "recovery",
        "reflection/tokens",
        "grad_norm",
        "lr",
    }


def test_rl_on_an_adapter_of_sft(base, tmp_path, environment):
    """Goes on training the adapter that it is given."""
    path = run_sft(sft_config(base, tmp_path / "sft", lora=LoraSettings(rank=2)))
    run_rl(rl_config(base, tmp_path / "rl", model=path, steps=2), environment)
    assert metrics_of(tmp_path / "rl")[0]["kl"] < 1e-3
    before, after = (state_of(tmp_path / kind)["model"] for kind in ("sft", "rl"))
    assert before.keys() == after.keys()
    assert not same(before, after)
    moved = max((after[n] - before[n]).abs().max().item() for n in before)
    assert moved < 0.01  # from where SFT ended, not from zero


def test_the_seed_draws_the_adapter_and_the_data(base, tmp_path):
    def first(name, seed):
        config = sft_config(base, tmp_path / name, steps=2, seed=seed, lora=LoraSettings(rank=2))
        run_sft(config)
        return state_of(tmp_path / name)["model"], metrics_of(tmp_path / name)

    torch.manual_seed(123)
    one = first("one", 0)
    torch.manual_seed(456)
    assert same(one, first("two", 0))
    assert not same(one, first("three", 1))


def test_wrong_inputs_are_errors_before_anything_is_written(base, tmp_path):
    out = tmp_path / "out"
    missing = [SourceConfig(str(tmp_path / "none.jsonl"))]
    with pytest.raises(FileNotFoundError, match=r"no data file at .*none\.jsonl"):
        run_sft(sft_config(base, out, data=missing))
    with pytest.raises(ValueError, match=r"no record to train on in .*longer than max_length=5"):
        run_sft(sft_config(base, out, max_length=5))
    with pytest.raises(FileNotFoundError, match=r"no model at .*no-model"):
        run_sft(sft_config(base, out, model=str(tmp_path / "no-model")))
    assert not out.exists()


def test_learning_rate():
    config = OptimConfig(lr=1.0, warmup_steps=4, final_lr_share=0.1)
    rates = [learning_rate(step, 24, config) for step in range(25)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:13] == [1.0] * 9
    assert rates[12:] == sorted(rates[12:], reverse=True)
    assert rates[18] == pytest.approx(0.55)
    assert rates[24] == pytest.approx(0.1)
    assert learning_rate(0, 1, OptimConfig(lr=1.0, warmup_steps=0)) == 1.0


def test_cosine_and_constant_schedules():
    shape = {"lr": 2.0, "warmup_steps": 4, "final_lr_share": 0.1}
    cosine = [
        learning_rate(step, 24, OptimConfig(schedule="cosine", **shape)) for step in range(25)
    ]
    constant = [
        learning_rate(step, 24, OptimConfig(schedule="constant", **shape)) for step in range(25)
    ]
    assert cosine[:4] == constant[:4] == [0.5, 1.0, 1.5, 2.0]
    assert constant[4:] == [2.0] * 21
    assert cosine[4] == 2.0
    assert cosine[9] == pytest.approx(2 * (0.1 + 0.9 * (1 + 0.5**0.5) / 2))
    assert cosine[14] == pytest.approx(2 * 0.55)
    assert cosine[24] == pytest.approx(2 * 0.1)
    assert cosine[4:] == sorted(cosine[4:], reverse=True)
    # A warm-up as long as the run, or longer, is all there is.
    longer = OptimConfig(lr=1.0, warmup_steps=10, schedule="cosine")
    assert [learning_rate(step, 3, longer) for step in range(3)] == [0.1, 0.2, 0.3]


def test_a_schedule_is_what_a_run_follows(base, tmp_path):
    optim = OptimConfig(lr=1e-3, schedule="cosine", warmup_steps=2)
    run_sft(sft_config(base, tmp_path, optim=optim))
    lines = metrics_of(tmp_path)
    assert [line["lr"] for line in lines] == [learning_rate(s, 6, optim) for s in range(6)]


def test_only_matrices_decay(model):
    matrices, vectors = build_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert {p.dim() for p in matrices["params"]} == {2}
    assert {p.dim() for p in vectors["params"]} == {1}
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


def test_pretraining_learns_to_copy(tmp_path, environment):
    config = PretrainConfig(
        out=str(tmp_path),
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        tokenizer_tasks=64,
        steps=12,
        save_every=100,
    )
    path = run_pretrain(config, environment)
    losses = [line["loss"] for line in metrics_of(tmp_path)]
    assert losses[-1] < losses[0]
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert AutoModelForCausalLM.from_pretrained(path).config.vocab_size == len(tokenizer)
