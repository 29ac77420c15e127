"""Packed forward against one sequence at a time, in fp64, over architectures and adapters."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from regrpo.modeling import (
    PACKED,
    attention,
    base_model,
    default_device,
    head,
    hidden_states,
    load_model,
    load_tokenizer,
    logit_softcap,
)
from regrpo.packing import collate
from regrpo.prefix_tree import single_nodes
from regrpo.segments import TokenizedTrajectory
from regrpo.tree_attention import AttentionPlan
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
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 8}  # shorter than sequences of the tests
CONFIGS = {
    "qwen2": (Qwen2Config, {}),
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {}),
    "mistral window": (MistralConfig, WINDOW),
    "qwen3": (Qwen3Config, {}),
    "gemma": (GemmaConfig, {}),
    "gemma2": (
        Gemma2Config,
        {**WINDOW, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": (Gemma3TextConfig, {}),
    "gemma3 window": (Gemma3TextConfig, WINDOW),
}


def random_model(name, folder, dtype=torch.float64, **kwargs):
    """A random model, saved and loaded as a user would; norms and biases are not trivial."""
    torch.manual_seed(0)
    config, options = CONFIGS[name]
    model = AutoModelForCausalLM.from_config(config(**SIZES, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return load_model(str(folder), dtype=dtype, **kwargs)


@pytest.fixture
def packed():
    lengths = [5, 1, 17, 2, 9]
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 48, (n,), generator=generator).tolist() for n in lengths]
    kinds = [int(Segment.ACTION)]
    return collate([TokenizedTrajectory(row, kinds * len(row)) for row in rows])


def randomised(model):
    """LoRA starts at zero; make it matter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def one_by_one(model, batch):
    """Hidden states of each sequence by itself, through transformers' own attention."""
    states = []
    bounds = batch.cu_seqlens.tolist()
    with attention(model, "sdpa" if base_model(model)._supports_sdpa else "eager"):
        for start, stop in pairwise(bounds):
            output = base_model(model).base_model(batch.input_ids[None, start:stop])
            states.append(output.last_hidden_state[0])
    return torch.cat(states)


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_one_by_one_with_its_gradient(name, rank, tmp_path, packed):
    model = randomised(random_model(name, tmp_path, lora_rank=rank))
    probe = torch.randn(len(packed.labels), 32, dtype=torch.float64)
    gradients = []
    for forward in (hidden_states, one_by_one):
        model.zero_grad()
        hidden = forward(model, packed)
        (hidden * probe).sum().backward()
        trained = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        gradients.append((hidden.detach(), trained))
    (packed_hidden, packed_grad), (hidden, grad) = gradients
    tolerance = 1e-5 if name == "gemma2" else 1e-10  # its softmax is in fp32 whatever the dtype
    torch.testing.assert_close(packed_hidden, hidden, rtol=tolerance, atol=tolerance)
    assert set(packed_grad) == set(grad)
    assert all("lora_" in n for n in grad) == bool(rank)
    tolerance = 1e-3 if name == "gemma2" else 1e-5  # norms are in fp32 everywhere
    for key, value in grad.items():
        torch.testing.assert_close(packed_grad[key], value, rtol=tolerance, atol=tolerance, msg=key)


@pytest.mark.parametrize("name", CONFIGS)
def test_head_of_hidden_states_gives_the_logits(name, tmp_path, packed):
    model = random_model(name, tmp_path)
    weight, bias = head(model)
    bounds = packed.cu_seqlens.tolist()
    logits = torch.cat([model(packed.input_ids[None, a:b]).logits[0] for a, b in pairwise(bounds)])
    ours = torch.nn.functional.linear(hidden_states(model, packed), weight, bias)
    if (cap := logit_softcap(model)) is not None:
        ours = cap * torch.tanh(ours / cap)
    assert (cap is not None) == (name == "gemma2")
    tolerance = 1e-5 if cap else 1e-10
    torch.testing.assert_close(ours, logits, rtol=tolerance, atol=tolerance)


def test_a_sequence_does_not_see_its_neighbours(tmp_path, packed):
    model = random_model("qwen2", tmp_path)
    before = hidden_states(model, packed)
    start, stop = packed.cu_seqlens[2:4].tolist()
    packed.input_ids[start:stop] = packed.input_ids[start:stop].flip(0)
    after = hidden_states(model, packed)
    same = torch.ones(len(before), dtype=torch.bool)
    same[start:stop] = False
    assert torch.equal(before[same], after[same])
    assert not torch.allclose(before[~same], after[~same])


def test_attention_is_put_back_also_after_an_error(tmp_path, packed):
    model = random_model("qwen2", tmp_path)
    before = model.config._attn_implementation
    hidden_states(model, packed)
    assert model.config._attn_implementation == before
    packed.input_ids[0] = 10**6
    with pytest.raises(IndexError):
        hidden_states(model, packed)
    assert model.config._attn_implementation == before


def test_adapter_off_is_the_base_model_and_a_saved_adapter_loads(tmp_path, packed):
    base = random_model("qwen2", tmp_path / "base")
    expected = hidden_states(base, packed)
    model = randomised(load_model(str(tmp_path / "base"), dtype=torch.float64, lora_rank=4))
    assert isinstance(model, PeftModel)
    adapted = hidden_states(model, packed)
    assert not torch.allclose(adapted, expected)
    with model.disable_adapter():
        assert torch.equal(hidden_states(model, packed), expected)
    assert torch.equal(hidden_states(model, packed), adapted)
    assert torch.equal(head(model)[0], head(base)[0])

    model.save_pretrained(str(tmp_path / "adapter"))
    again = load_model(str(tmp_path / "adapter"), dtype=torch.float64)
    assert torch.equal(hidden_states(again, packed), adapted)
    trained = {n for n, p in again.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    plain = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert torch.equal(hidden_states(plain, packed), adapted)
    with pytest.raises(ValueError, match=r"lora_rank is 8, but .* an adapter of rank 4"):
        load_model(str(tmp_path / "adapter"), lora_rank=8)


def test_a_saved_adapter_loads_from_any_working_directory(tmp_path, packed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_model("qwen2", "base")
    model = randomised(load_model("base", dtype=torch.float64, lora_rank=4))
    expected = hidden_states(model, packed)
    model.save_pretrained("adapter")
    # An adapter that was saved elsewhere may hold a relative path; saved again, it does not.
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    config["base_model_name_or_path"] = "base"
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    load_model("adapter", dtype=torch.float64).save_pretrained("again")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = load_model("../again", dtype=torch.float64)
    assert torch.equal(hidden_states(again, packed), expected)


def test_models_load_to_the_device_asked_for_or_the_best(tmp_path):
    for rank in (0, 4):
        folder = tmp_path / str(rank)
        assert base_model(random_model("qwen2", folder, lora_rank=rank)).device == default_device()
        model = random_model("qwen2", folder, lora_rank=rank, device="meta")
        assert {p.device.type for p in model.parameters()} == {"meta"}
    assert default_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_packed_attention_stays_on_the_device_of_its_inputs(packed):
    """Where there is no GPU, the meta device stands for one: it refuses tensors of the CPU."""
    query, key = (
        torch.empty(1, heads, len(packed.labels), 8, device="meta", requires_grad=True)
        for heads in (4, 2)
    )
    nodes = single_nodes(packed.cu_seqlens.tolist())
    plan = AttentionPlan(nodes, query.device)
    out, _ = AttentionInterface()[PACKED](None, query, key, key, None, plan=plan)
    out.sum().backward()
    assert out.device == query.grad.device == torch.device("meta")
    assert out.shape == (1, len(packed.labels), 4, 8)


def save(config, folder):
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def test_a_model_that_scales_its_logits_is_refused_by_name(tmp_path):
    path = save(CohereConfig(**SIZES, logit_scale=0.5), tmp_path)
    with pytest.raises(NotImplementedError, match=r"config\.logit_scale=0\.5"):
        load_model(path)


def test_attention_sinks_are_refused_by_name(packed):
    query = torch.zeros(1, 4, len(packed.labels), 8)
    plan = AttentionPlan(single_nodes(packed.cu_seqlens.tolist()), query.device)
    with pytest.raises(NotImplementedError, match="Identity: attention sinks"):
        AttentionInterface()[PACKED](
            torch.nn.Identity(), query, query, query, None, plan=plan, s_aux=torch.zeros(4)
        )


def test_a_model_with_its_own_attention_is_refused_by_name(tmp_path):
    path = save(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=32), tmp_path)
    with pytest.raises(NotImplementedError, match="BloomForCausalLM has its own attention"):
        load_model(path)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_path_without_a_folder_is_not_asked_of_the_hub(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/none", "./none", "../a/b", "runs/x/model", str(tmp_path / "none")):
        with pytest.raises(FileNotFoundError, match=rf"no model at {path}; expected a folder"):
            load(path)


def test_load_tokenizer(tmp_path, tokenizer, llama_tokenizer):
    for tok in (tokenizer, llama_tokenizer):
        tok.save_pretrained(tmp_path)
        again = load_tokenizer(str(tmp_path))
        text = "Thought: read oak.txt 12"
        assert again(text)["input_ids"] == tok(text)["input_ids"]
        assert again.chat_template == tok.chat_template
        assert again.pad_token_id is not None
