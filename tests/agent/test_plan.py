"""Plans against what tiny models of the same architectures really allocate and compute."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
)

from regrpo.config import LoraSettings, PlanConfig, SFTConfig, SourceConfig, TrainConfig
from regrpo.losses import policy_loss
from regrpo.modeling import head, load_model, new_adapter
from regrpo.packed_model import PackedModel
from regrpo.packing import collate
from regrpo.plan.flops import image_flops, update_flops
from regrpo.plan.model import build_on_meta, numel, vision_tower
from regrpo.plan.work import Work, work_of
from regrpo.segments import TokenizedTrajectory
from regrpo.sft import NLL
from regrpo_kernels import Segment
from regrpo_kernels.linear_grpo_loss import _linear_grpo_loss

TEXT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
VL_TEXT = {**TEXT, "rope_parameters": ROPE}
CONFIGS = {
    "qwen2": Qwen2Config(**TEXT, tie_word_embeddings=False),
    "qwen2_tied": Qwen2Config(**TEXT, tie_word_embeddings=True),
    "qwen2_vl": Qwen2VLConfig(
        text_config=VL_TEXT,
        vision_config={"depth": 3, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
    ),
    "qwen2_5_vl": Qwen2_5_VLConfig(
        text_config=VL_TEXT,
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 80,
            "num_heads": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
    ),
}
# Contexts and branches differ in length by so much that a CPU lays neither out with padding.
SHAPES = {"groups": 2, "size": 3, "context": 40, "new": 9, "observed": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny random models of each architecture, saved."""
    found = {}
    for name, config in CONFIGS.items():
        kind = AutoModelForImageTextToText if "vl" in name else AutoModelForCausalLM
        torch.manual_seed(0)
        found[name] = str(tmp_path_factory.mktemp(name))
        kind.from_config(config).save_pretrained(found[name])
    return found


def run_of(model, rank=0, **kwargs):
    return TrainConfig(model=model, out="o", lora=LoraSettings(rank=rank), **kwargs)


def really(name, folder, rank):
    """The model as it is trained; vision-language ones come with the same adapter."""
    if "vl" not in name:
        return load_model(folder, lora_rank=rank)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    return new_adapter(model, rank, 32, ("q_proj", "k_proj", "v_proj", "o_proj")) if rank else model


def work(**kwargs):
    counts = {"images": 0, "image_tokens": 4, "pass_tokens": 999, "samples": False}
    rest = {"reference": False, "scoring_passes": 0, "epochs": 1, "updates": 1}
    return Work(**{**SHAPES, **counts, **rest, **kwargs})


def packed_groups():
    """What ``work`` describes, packed: groups that share their context and nothing else."""
    generator = torch.Generator().manual_seed(3)

    def tokens(first, count):
        return [first, *torch.randint(20, 96, (count - 1,), generator=generator).tolist()]

    rows = []
    for group in range(SHAPES["groups"]):
        context = tokens(3 + group, SHAPES["context"])
        for k in range(SHAPES["size"]):
            kinds = [Segment.CONTEXT] * SHAPES["context"]
            kinds += [Segment.OBSERVATION] * SHAPES["observed"] + [Segment.ACTION] * SHAPES["new"]
            branch = tokens(10 + k, SHAPES["observed"]) + tokens(9, SHAPES["new"])
            rows.append(TokenizedTrajectory(context + branch, [int(k) for k in kinds]))
    batch = collate(rows, share=True)
    assert len(batch.tree.input_ids) == work().tokens
    assert int(batch.loss_mask.sum()) == work().trained
    return batch


def attention_flops(q, k, v, dropout=0.0, is_causal=False, *_, **__):
    count, heads, length, width = q
    pairs = length * (length + 1) // 2 if is_causal else length * k[2]
    return 4 * count * heads * width * pairs


def attention_backward_flops(dout, q, k, v, out, lse, dropout=0.0, is_causal=False, *_, **__):
    return attention_flops(q, k, v, dropout, is_causal) * 5 // 2


def head_flops(*arguments, out_val=None, **kwargs):
    with FlopCounterMode(display=False) as counter:  # its products, not a formula for them
        _linear_grpo_loss(*arguments)
    return counter.get_total_flops()


head_flops._get_raw = True
aten = torch.ops.aten
MEASURED = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    torch.ops.regrpo_kernels.linear_grpo_loss: head_flops,
}


def counter():
    return FlopCounterMode(display=False, custom_mapping=MEASURED)


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_model_that_is_trained(name, rank, folders):
    found = build_on_meta(run_of(folders[name], rank))
    expected = really(name, folders[name], rank)
    assert {p.device.type for p in found.parameters()} == {"meta"}
    assert [(n, p.shape, p.requires_grad) for n, p in found.named_parameters()] == [
        (n, p.shape, p.requires_grad) for n, p in expected.named_parameters()
    ]
    assert numel(found) == numel(expected)
    assert (vision_tower(found) is not None) == ("vl" in name)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["qwen2", "qwen2_tied"])
def test_flops_of_a_pass_are_those_that_torch_counts(name, rank, checkpointing, folders):
    run = run_of(folders[name], rank, gradient_checkpointing=checkpointing)
    parts = update_flops(run, build_on_meta(run), work(reference=True))
    packed = PackedModel(
        load_model(run.model, lora_rank=rank), gradient_checkpointing=checkpointing
    )
    batch = packed_groups()
    with torch.no_grad(), counter() as scoring:
        packed(batch)
    with counter() as forward:
        hidden = packed(batch)
    with counter() as loss:
        out = policy_loss(hidden, *packed.head(), batch, NLL, 54.0).loss
    with counter() as backward:
        out.backward()
    assert parts["forward"] == forward.get_total_flops() == scoring.get_total_flops()
    head_forward = 2 * head(packed.model)[0].numel() * work().trained
    assert parts["reference log-probs"] == parts["forward"] + head_forward
    assert parts["loss head"] == loss.get_total_flops()
    again = parts.get("forward again (checkpointing)", 0)
    assert (again > 0) == checkpointing
    assert parts["backward"] + again == backward.get_total_flops()


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_flops_of_images_are_those_that_torch_counts(name, trained, folders):
    """Within 2 %: the merger's and the windows' remainders are not worth a formula."""
    rank = 0 if trained else 4
    tower = vision_tower(really(name, folders[name], rank))
    grid = torch.tensor([[1, 8, 8]])
    patches = torch.randn(64, tower.patch_embed.proj.weight[0].numel())
    with counter() as forward:
        out = tower(patches, grid_thw=grid)
    out = out.pooler_output if hasattr(out, "pooler_output") else out
    expected, back = image_flops(build_on_meta(run_of(folders[name], rank)), image_tokens=16)
    assert expected == pytest.approx(forward.get_total_flops(), rel=0.02)
    assert out.requires_grad == (back > 0) == trained
    if trained:
        with counter() as backward:
            out.sum().backward()
        assert back == pytest.approx(backward.get_total_flops(), rel=0.02)


def test_work_is_what_the_file_and_the_lengths_say():
    run = run_of("m", states=5, group_size=3, max_new_tokens=10, epochs=2)
    plan = PlanConfig(run="f", processes=2, prompt_tokens=100, observation_tokens=7, images=2)
    found = work_of(run, plan)
    assert (found.groups, found.size, found.context) == (3, 3, 100 + 2 * 768)
    assert (found.new, found.observed) == (20, 7)
    assert found.tokens == 3 * (1636 + 3 * 27) == found.pass_tokens
    sft = SFTConfig(model="m", out="o", data=[SourceConfig("d")], max_length=900, batch_tokens=4000)
    found = work_of(sft, PlanConfig(run="f", prompt_tokens=600))
    assert (found.groups, found.size, found.new, found.trained) == (4, 1, 300, 1200)
    assert (found.samples, found.reference) == (False, False)


@pytest.mark.parametrize(
    ("run", "plan", "message"),
    [
        (run_of("m"), {"processes": 99}, "processes: got 99; expected at most one for each of"),
        (run_of("m"), {"prompt_tokens": 17000}, "prompt_tokens: got 17000; expected .* to fit"),
        (run_of("m"), {"new_tokens": 999}, "new_tokens: got 999; expected at most .*=192"),
        (
            SFTConfig(model="m", out="o", data=[SourceConfig("d")]),
            {"images": 2},
            "prompt_tokens: got 512; expected room for new tokens within max_length=1024 beside",
        ),
    ],
)
def test_lengths_that_a_run_does_not_allow(run, plan, message):
    with pytest.raises(ValueError, match=message):
        work_of(run, PlanConfig(run="f", **plan))
