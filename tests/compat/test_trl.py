"""TRL's functions on our kernels, and stock GRPOTrainers with and without them."""

import inspect

import pytest
import torch
from loss_types64 import LOSS_TYPES

from regrpo_kernels.compat import trl as ours


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5), (2, 2, 3, 5)], ids=str)
def test_selective_log_softmax(shape, dtype):
    logits = torch.randn(shape, dtype=dtype, requires_grad=True)
    index = torch.randint(0, 5, shape[:-1])
    mask = torch.rand(index.shape) > 0.3
    got = ours.selective_log_softmax(logits, index, temperature=0.7, row_mask=mask)
    exact = logits.detach().double().requires_grad_()
    log_p = (exact / 0.7).log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(got.double(), log_p * mask, rtol=1e-5, atol=1e-5)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    got.sum().backward()
    (log_p * mask).sum().backward()
    rtol = 1e-5 if dtype in (torch.float32, torch.float64) else 1e-2
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=rtol, atol=1e-5)


def test_several_indices_of_a_row():
    logits = torch.randn(2, 3, 7, requires_grad=True)
    index = torch.randint(0, 7, (2, 3, 4))
    got = ours.selective_log_softmax(logits, index)
    exact = logits.detach().double().requires_grad_()
    expected = exact.log_softmax(-1).gather(-1, index)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(2, 3, 4)
    got.backward(upstream)
    expected.backward(upstream.double())
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


def test_entropy_from_logits():
    logits = torch.randn(2, 3, 7, requires_grad=True)
    got = ours.entropy_from_logits(logits, chunk_size=2)
    log_p = logits.detach().double().requires_grad_().log_softmax(-1)
    torch.testing.assert_close(got.double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-5)
    got.sum().backward()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_chunked_log_probs(scale, softcap):
    leaves = [torch.randn(6, 4), torch.randn(9, 4), torch.randn(9)]
    targets = torch.randint(0, 9, (6,))
    exact = [x.double().requires_grad_() for x in leaves]
    z = scale * (exact[0] @ exact[1].T + exact[2])
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p = (z / 0.7).log_softmax(-1)
    expected = (log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1))
    (2 * expected[0] + expected[1]).sum().backward()
    got_leaves = [x.clone().requires_grad_() for x in leaves]
    got = ours.chunked_log_probs(*got_leaves, targets, 0.7, 5, softcap, scale)
    (2 * got[0] + got[1]).sum().backward()
    for a, b in zip(got, expected, strict=False):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    assert got[2:] == (None, None, None)
    for a, b in zip(got_leaves, exact, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-5)


def test_bad_arguments_are_named():
    logits, ids = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="index"):
        ours.selective_log_softmax(logits, ids[:, :2])
    with pytest.raises(ValueError, match="row_mask"):
        ours.selective_log_softmax(logits, ids, row_mask=ids[:, :2])
    with pytest.raises(ValueError, match="temperature"):
        ours.selective_log_softmax(logits, ids, temperature=0.0)
    with pytest.raises(ValueError, match="chunk_size"):
        ours.entropy_from_logits(logits, chunk_size=0)
    rows = (logits[0], logits[0], None, ids[0], 1.0, 8)
    for name in ("is_top1", "mean_logits", "log_sum_sq_probs", "median"):
        with pytest.raises(ValueError, match=name):
            ours.chunked_log_probs(*rows, outputs=("entropy", name))
    with pytest.raises(ValueError, match="logit_scale"):
        ours.chunked_log_probs(*rows, None, -1.0)


# --- the installed peer ---------------------------------------------------------------------------


@pytest.fixture
def trl():
    return pytest.importorskip("trl")


def test_functions_are_trls(trl):
    utils = pytest.importorskip("trl.trainer.utils")
    logits = torch.randn(2, 3, 7)
    index = torch.randint(0, 7, (2, 3))
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    torch.testing.assert_close(
        ours.selective_log_softmax(logits, index, 0.7, mask),
        utils.selective_log_softmax(logits, index, 0.7, mask),
    )
    torch.testing.assert_close(ours.entropy_from_logits(logits), utils.entropy_from_logits(logits))
    for name in ("selective_log_softmax", "entropy_from_logits"):
        theirs = inspect.signature(getattr(utils, name)).parameters
        assert list(inspect.signature(getattr(ours, name)).parameters) == list(theirs)


def test_chunked_log_probs_are_trls(trl):
    kernels = pytest.importorskip("trl.kernels")
    rows = (torch.randn(6, 4), torch.randn(9, 4), torch.randn(9), torch.randint(0, 9, (6,)))
    arguments = (*rows, 0.7, 4, 3.0, 0.5, ("entropy",))
    torch.testing.assert_close(
        ours.chunked_log_probs(*arguments), kernels.ChunkedLogProbFunction.apply(*arguments)
    )


WORDS = [f"w{i}" for i in range(30)]


def make_trainer(folder, gemma=False, lora=False, subclass=None, **options):
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen2ForCausalLM,
    )
    from trl import GRPOConfig, GRPOTrainer

    backend = Tokenizer(
        WordLevel({"<pad>": 0, "</s>": 1, **{w: i + 2 for i, w in enumerate(WORDS)}}, "<pad>")
    )
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>"
    )
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.5,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    if gemma:
        model = Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=4.0))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    model.save_pretrained(folder / "model")  # the reference is loaded from there
    model = type(model).from_pretrained(folder / "model")
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "num_iterations": 2,  # an old policy that is not the current one
        "max_completion_length": 6,
        "max_steps": 3,
        "learning_rate": 0.05,
        "temperature": 0.8,
        "beta": 0.1,
        "use_bias_correction_kl": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "seed": 3,
    }
    return (subclass or GRPOTrainer)(
        model=model,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if lora else None,
        reward_funcs=lambda completion_ids, **_: [float(sum(x) % 7) for x in completion_ids],
        args=GRPOConfig(**{**settings, **options}),
        train_dataset=Dataset.from_dict({"prompt": ["w1 w2", "w3", "w4 w5 w6", "w7"]}),
        eval_dataset=Dataset.from_dict({"prompt": ["w8", "w9"]}),
        processing_class=tokenizer,
    )


NOT_COMPARED = ("time", "runtime", "per_second", "num_tokens", "total_flos")


def run(folder, patched, **options):
    """Losses, gradient norms and metrics of every step; the weights; how many one-sweep losses."""
    from regrpo_kernels.compat import scaled_head

    trainer = make_trainer(folder, **options)
    sweeps = []
    loss = scaled_head.ScaledHead.loss
    if patched:
        assert ours.patch_grpo_trainer(trainer) is trainer

    def counted(self, *args, **kwargs):
        sweeps.append(1)
        return loss(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaled_head.ScaledHead, "loss", counted)
        trainer.train()
        trainer.evaluate()
    history = [
        {name: x for name, x in entry.items() if not any(y in name for y in NOT_COMPARED)}
        for entry in trainer.state.log_history
    ]
    return history, dict(trainer.model.named_parameters()), len(sweeps)


def assert_same_run(folder, one_sweep, **options):
    stock, weights, _ = run(folder / "stock", False, **options)
    found, ours_weights, sweeps = run(folder / "ours", True, **options)
    assert (sweeps > 0) == one_sweep
    assert len(found) == len(stock) > 3
    for a, b in zip(found, stock, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=2e-5, nan_ok=True)
    for name, weight in weights.items():
        torch.testing.assert_close(ours_weights[name], weight, rtol=1e-3, atol=1e-4)


RUNS = {
    **{name: ({"loss_type": name}, name != "vespo") for name in LOSS_TYPES if name != "cispo"},
    "cispo": ({"loss_type": "cispo", "epsilon_high": 2.0}, True),
    "cispo below 1": ({"loss_type": "cispo", "epsilon_high": 0.5}, False),
    "gspo": ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, False),
    "luspo sequence": ({"loss_type": "luspo", "importance_sampling_level": "sequence"}, False),
    "delta": ({"loss_type": "dapo", "delta": 1.3, "epsilon": 0.05}, True),
    "bias-corrected kl": ({"use_bias_correction_kl": True}, False),
    "no kl": ({"beta": 0.0}, True),
    "on policy": ({"num_iterations": 1, "steps_per_generation": 2}, True),
    "entropy mask": ({"top_entropy_quantile": 0.5}, False),
    "entropy bonus": ({"entropy_coef": 0.01}, False),
    "off-policy mask": ({"off_policy_mask_threshold": 0.01}, False),
    "softcap": ({"gemma": True}, True),
    "adapter": ({"lora": True}, True),
    "fp32 head": ({"cast_lm_head_to_fp32": True}, True),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_patched_run_is_the_stock_run(trl, tmp_path, name):
    options, one_sweep = RUNS[name]
    assert_same_run(tmp_path, one_sweep, **options)


@pytest.mark.parametrize("ratio_columns", [6, 1], ids=["token ratio", "sequence ratio"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_tool_masks_and_a_samplers_ratios(trl, tmp_path, loss_type, ratio_columns):
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(2, 32, (4, 9), generator=g)
    mask = (torch.arange(6) < torch.tensor([6, 4, 5, 6]).unsqueeze(-1)).long()
    tool_mask = torch.ones_like(mask)
    tool_mask[:, 2] = 0
    inputs = {
        "prompt_ids": ids[:, :3],
        "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1], [1, 1, 1]]),
        "completion_ids": ids[:, 3:],
        "completion_mask": mask,
        "tool_mask": tool_mask,
        "advantages": torch.tensor([1.2, -0.4, 0.3, -1.1]),
        "old_per_token_logps": -3.5 + torch.randn(4, 6, generator=g) / 3,
        "ref_per_token_logps": -3.5 + torch.randn(4, 6, generator=g) / 3,
        "importance_sampling_ratio": torch.rand(4, ratio_columns, generator=g) + 0.2,
        "num_items_in_batch": torch.tensor(70.0),
    }
    found = []
    for patched in (False, True):
        trainer = make_trainer(tmp_path, loss_type=loss_type, epsilon_high=1.5, beta=0.1)
        trainer.current_gradient_accumulation_steps = 2
        # as with vLLM, which is not needed for samples that are here already
        trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, True
        if patched:
            ours.patch_grpo_trainer(trainer)
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        gradients = {name: x.grad for name, x in trainer.model.named_parameters()}
        found.append((loss.detach(), gradients, dict(trainer._metrics["train"])))
    torch.testing.assert_close(found[1][:2], found[0][:2], rtol=1e-4, atol=1e-5)
    assert found[1][2].keys() == found[0][2].keys()
    for name, value in found[0][2].items():
        assert found[1][2][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_what_is_not_supported_is_refused(trl, tmp_path):
    with pytest.raises(TypeError, match="GRPOTrainer"):
        ours.patch_grpo_trainer(object())

    class Other(trl.GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs)

    with pytest.raises(ValueError, match="_compute_loss"):
        ours.patch_grpo_trainer(make_trainer(tmp_path, subclass=Other))
    trainer = ours.patch_grpo_trainer(make_trainer(tmp_path))
    with pytest.raises(ValueError, match="already"):
        ours.patch_grpo_trainer(trainer)
    trainer = make_trainer(tmp_path)
    trainer.aux_loss_enabled = True
    with pytest.raises(ValueError, match="router_aux_loss_coef"):
        ours.patch_grpo_trainer(trainer)
