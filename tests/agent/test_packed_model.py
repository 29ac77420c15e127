"""Recomputed layers and 16-bit computation against the model as it is."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from runs import metrics_of, rl_config, sft_config, state_of
from transformers import AutoModelForCausalLM, Gemma2Config, OPTConfig, Qwen2Config

from regrpo.config import LoraSettings, OptimConfig
from regrpo.losses import policy_loss
from regrpo.modeling import base_model
from regrpo.packed_model import PackedModel, load_packed
from regrpo.packing import collate
from regrpo.rl import run_rl
from regrpo.sampling import sample
from regrpo.segments import TokenizedTrajectory
from regrpo.sft import NLL, run_sft
from regrpo_kernels import Segment

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# Attention in dense parts, and node by node (a window, softcaps).
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES),
    "gemma2": Gemma2Config(**SIZES, sliding_window=8, attn_logit_softcapping=2.0),
}


def build(name, rank):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    if rank:
        lora = LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    with torch.no_grad():  # an adapter starts at zero
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def batch():
    """Two groups that share their contexts."""
    generator = torch.Generator().manual_seed(3)

    def tokens(count):
        return torch.randint(3, 48, (count,), generator=generator).tolist()

    rows = []
    for context in (tokens(9), tokens(4)):
        for count in (3, 12, 6):
            kinds = [int(Segment.CONTEXT)] * len(context) + [int(Segment.ACTION)] * count
            rows.append(TokenizedTrajectory(context + tokens(count), kinds))
    return collate(rows, share=True)


def gradients(packed, batch):
    """The loss, and the gradients of one pass, in float32."""
    packed.zero_grad()
    torch.manual_seed(5)
    loss = policy_loss(packed(batch), *packed.head(), batch, NLL, 42.0).loss
    loss.backward()
    named = packed.model.named_parameters()
    return loss.item(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def count_calls(model):
    calls = []
    for layer in base_model(model).base_model.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    return calls


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_recomputed_layers_give_the_same_gradient(name, rank, training, batch):
    model = build(name, rank).train(training)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    calls = count_calls(model)
    expected_loss, expected = gradients(PackedModel(model), batch)
    assert len(calls) == 2
    loss, found = gradients(PackedModel(model, gradient_checkpointing=True), batch)
    assert len(calls) == 6, "each layer runs once more in backward"
    assert loss == expected_loss
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    # Only in training mode does dropout do anything.
    torch.manual_seed(6)
    again = policy_loss(
        PackedModel(model)(batch), *PackedModel(model).head(), batch, NLL, 42.0
    ).loss.item()
    assert (again != loss) == training


def test_sampling_from_a_model_with_recomputed_layers(batch):
    model = build("gemma2", 0)  # decoded with transformers' own cache, which checkpointing drops
    prompts, limits = [[3, 4, 5], [6, 7]], {"stop_id": 2, "pad_id": 0, "max_new_tokens": 6}
    expected = sample(model, prompts, temperature=0, **limits)
    packed = PackedModel(model, gradient_checkpointing=True)
    gradients(packed, batch)
    assert sample(model, prompts, temperature=0, **limits) == expected
    calls = count_calls(model)
    gradients(packed, batch)
    assert len(calls) == 4, "and training goes on recomputing"


def test_layers_that_apply_dropout_themselves_are_refused():
    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(
        OPTConfig(vocab_size=20, word_embed_proj_dim=16, dropout=0.1, **sizes)
    )
    with pytest.raises(NotImplementedError, match="OPTDecoderLayer applies dropout itself"):
        PackedModel(model, gradient_checkpointing=True)


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_in_bfloat16_are_those_of_float32_within_its_rounding(name, rank, batch):
    model = build(name, rank)
    expected_loss, expected = gradients(PackedModel(model), batch)
    low = PackedModel(model, dtype=torch.bfloat16, gradient_checkpointing=True)
    if rank:
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    hidden = low(batch)
    assert hidden.dtype == low.head()[0].dtype == torch.bfloat16
    loss, found = gradients(low, batch)
    assert loss == pytest.approx(expected_loss, rel=2**-7)
    assert loss != expected_loss
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == torch.float32, key
        error = (found[key] - value).norm() / value.norm()
        assert error < 0.06, (key, error)  # a few roundings of 2**-8 a layer, amplified by depth


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
def test_sft_in_bfloat16_trains_float32_weights(rank, base, tmp_path):
    options = {
        "model": str(base / "random"),
        "steps": 25,
        "optim": OptimConfig(lr=1e-2),
        "lora": LoraSettings(rank=rank),
    }
    losses = {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        run_sft(sft_config(base, out, dtype=dtype, gradient_checkpointing=True, **options))
        losses[dtype] = [line["loss"] for line in metrics_of(out)]
        state = state_of(out)
        assert {p.dtype for p in state["model"].values()} == {torch.float32}
        moments = state["optimizer"]["state"].values()
        assert {m["exp_avg"].dtype for m in moments} == {torch.float32}
    low, high = losses["bfloat16"], losses["float32"]
    assert low[0] == pytest.approx(high[0], rel=0.01)
    assert low[-1] == pytest.approx(high[-1], rel=0.05)
    assert low[-1] < 0.9 * low[0]
    assert low != high


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
def test_rl_in_bfloat16_samples_from_what_it_trains(rank, base, tmp_path, environment):
    config = rl_config(
        base,
        tmp_path,
        steps=2,
        epochs=1,
        dtype="bfloat16",
        gradient_checkpointing=True,
        lora=LoraSettings(rank=rank),
    )
    run_rl(config, environment)
    for line in metrics_of(tmp_path):
        assert line["ratio/mean"] == pytest.approx(1, abs=0.02)
        assert line["grad_norm"] > 0
    assert metrics_of(tmp_path)[0]["kl"] < 1e-6  # the reference is the start, in the same dtype


def test_auto_is_what_the_model_is_saved_in(base, tmp_path):
    def saved_in(dtype):
        path = tmp_path / str(dtype)
        model = AutoModelForCausalLM.from_pretrained(base / "model", dtype=dtype)
        model.save_pretrained(path)
        return str(path)

    def load(model, dtype="auto", rank=0):
        return load_packed(
            sft_config(base, tmp_path, model=model, dtype=dtype, lora=LoraSettings(rank=rank))
        )

    def dtypes(packed, trained):
        return {p.dtype for p in packed.parameters() if p.requires_grad == trained}

    high, low = saved_in(torch.float32), saved_in(torch.bfloat16)
    assert load(high).dtype is None
    assert dtypes(load(high, "bfloat16"), True) == {torch.float32}
    assert torch.equal(
        load(high, "bfloat16").model.lm_head.weight, load(high).model.lm_head.weight
    ), "not rounded"
    for model, dtype in ((low, "auto"), (high, "bfloat16")):
        assert load(model, dtype).dtype == torch.bfloat16
        adapted = load(model, dtype, rank=2)
        assert dtypes(adapted, True) == {torch.float32}
        assert dtypes(adapted, False) == {torch.bfloat16}
    assert dtypes(load(low), True) == {torch.float32}
    with pytest.raises(ValueError, match=r"dtype: got 'auto', and .* is saved in torch.float16"):
        load(saved_in(torch.float16))
