"""Plans against what tiny models of the same architectures really allocate and compute."""

import weakref
from inspect import signature
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    OPTConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    T5Config,
)

from regrpo.cli import main, read_run
from regrpo.config import LoraSettings, PlanConfig, SFTConfig, SourceConfig, TrainConfig
from regrpo.decoding import Continuations
from regrpo.learner import Learner
from regrpo.losses import policy_loss
from regrpo.modeling import head, load_model, new_adapter
from regrpo.packed_model import PackedModel, load_packed
from regrpo.packing import collate
from regrpo.plan.activations import (
    image_bytes,
    kept_activations,
    key_value_bytes,
    last_activations,
)
from regrpo.plan.flops import image_flops, update_flops
from regrpo.plan.memory import MAX_BATCH, branch_room, head_bytes, memory, peak
from regrpo.plan.model import Precision, build_on_meta, numel, precision, vision_tower
from regrpo.plan.report import decoding_bytes, make_plan, show
from regrpo.plan.work import Work, work_of
from regrpo.sampling import LocalSession, sample
from regrpo.segments import TokenizedTrajectory
from regrpo.sft import NLL
from regrpo.trainer import build_optimizer
from regrpo_kernels import Segment
from regrpo_kernels.linear_grpo_loss import _linear_grpo_loss
from regrpo_kernels.linear_head import CHUNK_BYTES

TEXT = {
    "vocab_size": 512,
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
        vision_config={"depth": 3, "embed_dim": 128, "hidden_size": 64, "num_heads": 4},
    ),
    "qwen2_5_vl": Qwen2_5_VLConfig(
        text_config=VL_TEXT,
        vision_config={
            "depth": 3,
            "hidden_size": 128,
            "out_hidden_size": 64,
            "intermediate_size": 320,
            "num_heads": 4,
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
    """The model as it is trained; a vision tower is frozen."""
    if "vl" not in name:
        return load_model(folder, lora_rank=rank)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    vision_tower(model).requires_grad_(False)
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


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_images_cost_what_torch_counts_and_hold_what_is_planned(name, folders):
    tower = vision_tower(really(name, folders[name], 0))
    model = build_on_meta(run_of(folders[name]))
    pixels = torch.randn(1024, tower.patch_embed.proj.weight[0].numel())
    with counter() as counted, Live() as live:
        tower(pixels, grid_thw=torch.tensor([[1, 32, 32]]))
    assert image_flops(model, image_tokens=256) == counted.get_total_flops()
    held = live.most + pixels.untyped_storage().nbytes()
    assert image_bytes(model, Precision(4, 4, 4), 256) == pytest.approx(held, rel=0.05)


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_weights_gradients_and_moments_are_what_is_allocated(rank, dtype, folders):
    run = run_of(folders["qwen2"], rank, dtype=dtype)
    parts = memory(run, build_on_meta(run), work(reference=True), PlanConfig(run="f"))
    expected = {part.name: part.bytes for part in parts}
    packed, batch = load_packed(run), packed_groups()
    learner = Learner(packed.model, run, packed=packed)
    policy_loss(packed(batch), *packed.head(), batch, NLL, 54.0).loss.backward()
    optimizer = build_optimizer(packed.model, run.optim)
    optimizer.step()
    weights = list(packed.model.parameters())
    moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]

    def total(tensors):
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    assert total(w for w in weights if not w.requires_grad) == expected.get("weights, frozen", 0)
    assert total(w for w in weights if w.requires_grad) == expected["weights, trained"]
    assert total(w.grad for w in weights if w.grad is not None) == expected["gradients"]
    assert total(moments) == expected["AdamW moments"]
    assert total(start for _, start in learner._start) == expected["reference"]


def one_sequence(length):
    ids = torch.randint(20, 96, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    return collate([TokenizedTrajectory(ids, [int(Segment.ACTION)] * length)])


def saved_bytes(module, *arguments, **kwargs):
    """Bytes of what autograd saves in a forward pass, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and tensor.is_floating_point():
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(*arguments, **kwargs)
    assert out is not None  # what is saved is alive until here
    return sum(found.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_activations_are_what_autograd_saves(rank, dtype, folders):
    run = run_of(folders["qwen2"], rank, dtype=dtype)
    model = build_on_meta(run)
    packed = load_packed(run)
    # The difference leaves copies of weights out.
    short, long = (saved_bytes(packed, one_sequence(length)) for length in (64, 320))
    found = (long - short) / 256
    kinds = precision(run, model)
    expected = kept_activations(model, kinds, recomputed=False)
    expected += last_activations(model, kinds)
    expected -= kinds.compute * TEXT["hidden_size"]  # the hidden states themselves go to the loss
    assert expected == pytest.approx(found, rel=0.03)


class Live(TorchDispatchMode):
    """The most bytes of tensors that were made inside and are alive together."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = [x.untyped_storage() for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                if storage not in self.known and all(storage is not x for x in inputs):
                    self.known[storage] = None
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._free, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _free(self, size):
        self.now -= size


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_a_pass_holds_what_is_planned(rank, dtype, checkpointing, folders):
    folder = folders["qwen2"]
    run = run_of(folder, rank, dtype=dtype, gradient_checkpointing=checkpointing)
    model = build_on_meta(run)
    length = 1024
    shapes = {"groups": 1, "size": 1, "context": 1, "new": length - 1, "observed": 0}
    parts = memory(run, model, work(**shapes, pass_tokens=length), PlanConfig(run="f"))
    # The head is one operator, in which nothing is seen: it is compared by itself.
    seen = [part for part in parts if part.phase != "always" and part.name != "loss head"]
    expected = peak(seen)
    packed, batch = load_packed(run), one_sequence(length)
    with Live() as live:
        policy_loss(packed(batch), *packed.head(), batch, NLL, None).loss.backward()
    assert 0.95 < expected / live.most < 1.15


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_the_loss_head_holds_what_is_planned(rank, dtype, folders, monkeypatch):
    chunk_bytes = 128 * TEXT["vocab_size"] * 4
    monkeypatch.setitem(CHUNK_BYTES, "cpu", chunk_bytes)
    run = run_of(folders["qwen2"], rank, dtype=dtype)
    packed, batch = load_packed(run), one_sequence(200)
    found = []

    def keep(*arguments, **_):
        found.append(arguments)
        return 0

    keep._get_raw = True
    operator = torch.ops.regrpo_kernels.linear_grpo_loss
    with FlopCounterMode(display=False, custom_mapping={operator: keep}):
        policy_loss(packed(batch), *packed.head(), batch, NLL, None)
    with torch.no_grad(), Live() as live:
        _linear_grpo_loss(*found[0])
    model = build_on_meta(run)
    kinds = precision(run, model)
    rows = 199
    expected = head_bytes(model, kinds, rows, chunk_bytes)
    expected -= kinds.compute * rows * TEXT["hidden_size"]  # the rows that it is given
    assert 0.93 < expected / live.most < 1.02


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_sampling_holds_what_is_planned(rank, dtype, folders):
    run = run_of(folders["qwen2"], rank, dtype=dtype)
    packed, model = load_packed(run), build_on_meta(run)
    sizes = {"groups": 3, "size": 4, "context": 300, "new": 70, "observed": 0}
    planned = work(**sizes, samples=True)
    parts = memory(run, model, planned, PlanConfig(run="f"))
    phases = ("sampling", "prefill", "decoding")
    expected = peak([part for part in parts if part.phase in phases])
    contexts = [[3 + g, *([30] * 299)] for g in range(3)]
    prompts = [context for context in contexts for _ in range(4)]
    with Live() as live, packed.sampling():
        sample(packed.model, prompts, stop_id=-1, pad_id=0, temperature=1.0, max_new_tokens=70)
    assert 0.97 < expected / live.most < 1.05
    assert signature(LocalSession).parameters["max_batch"].default == MAX_BATCH
    with torch.no_grad(), packed.sampling():
        rows = Continuations(packed.model, prompts)
        for _ in range(70):
            rows.append(torch.full((12,), 5))
    token = key_value_bytes(model, precision(run, model))
    assert rows.nbytes == token * 3 * (300 + 4 * branch_room(70))


def write(path, **values):
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_a_plan_of_a_file_is_that_of_its_run(folders, tmp_path, capsys):
    path = write(tmp_path / "run.yaml", model=folders["qwen2"], out="o", steps=7, lora={"rank": 4})
    main(["plan", "--run", path, "--prompt_tokens", "100", "--gpu_gib", "1"])
    text = capsys.readouterr().out
    model = load_model(folders["qwen2"], lora_rank=4)
    assert f"{numel(model) / 1e3:.2f} k parameters" in text
    assert "24 states of 100 tokens x 5 trajectories of 192 trained and 64 observed" in text
    assert "the run, 7 updates" in text
    assert "float32 with --peak_tflops" in text
    assert not (tmp_path / "o").exists()
    found = make_plan(read_run(path), PlanConfig(run=path, prompt_tokens=100, gpu_gib=1e-9))
    assert not found.fits
    show(found)
    text = capsys.readouterr().out
    assert "does not fit" in text
    assert "gradient_checkpointing: true, dtype: bfloat16, a smaller batch_tokens" in text
    # Decoding waits for what it reads.
    slow = PlanConfig(run=path, prompt_tokens=100, bandwidth_gbs=1e-3)
    seconds = make_plan(read_run(path), slow).seconds["rollout, decoding"]
    assert seconds == decoding_bytes(found.run, found.model, found.work) / 1e6


def test_fsdp_shares_what_is_kept(folders):
    plan = PlanConfig(run="f", processes=2)
    alone = make_plan(run_of(folders["qwen2"]), PlanConfig(run="f"))
    parts = {}
    for parallel in ("ddp", "fsdp"):
        found = make_plan(run_of(folders["qwen2"], parallel=parallel), plan)
        parts[parallel] = {part.name: part.bytes for part in found.memory if part.phase == "always"}
        assert sum(found.flops.values()) == sum(alone.flops.values())
        assert sum(found.seconds.values()) < sum(alone.seconds.values())
    assert parts["fsdp"] == {name: value / 2 for name, value in parts["ddp"].items()}


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ({"stepz": 3}, [], "run.yaml, as a file of regrpo train: Option 'stepz' is not accepted"),
        ({"steps": 0}, [], "run.yaml, as a file of regrpo train: steps: got 0; expected 1 or more"),
        ({}, ["--command", "sft"], "regrpo sft: the following arguments are required: data"),
        ({"model": "x/y/z"}, [], "configuration of x/y/z cannot be read; expected a folder"),
        ({}, ["--model_config", "no.json"], "model_config: no file at no.json"),
        ({}, ["--images", "2"], "images: got 2; expected 0 with Qwen2ForCausalLM, which reads"),
        ({}, ["--utilization", "2"], "utilization: got 2.0; expected above 0, at most 1"),
    ],
)
def test_wrong_input_is_one_line(values, options, message, folders, tmp_path):
    path = write(tmp_path / "run.yaml", **{"model": folders["qwen2"], "out": "o", **values})
    with pytest.raises(SystemExit) as error:
        main(["plan", "--run", path, *options])
    assert message in error.value.code
    assert "\n" not in error.value.code


def test_other_architectures_are_refused(tmp_path):
    for config, what in ((OPTConfig(), "layers of fc1, fc2"), (T5Config(), "of type t5")):
        config.save_pretrained(tmp_path)
        with pytest.raises(NotImplementedError, match=what):
            build_on_meta(run_of(str(tmp_path)))


CONFIG_FILES = Path(__file__).parents[2] / "configs"
PUBLISHED = str(CONFIG_FILES / "models/qwen2_vl_7b.json")


@pytest.mark.parametrize("name", ["qwen2_vl_7b_sft", "qwen2_vl_7b_regrpo"])
def test_the_papers_run_can_be_planned(name):
    path = str(CONFIG_FILES / f"{name}.yaml")
    plan = PlanConfig(run=path, model_config=PUBLISHED, prompt_tokens=4096, images=1)
    found = make_plan(read_run(path), plan)
    trained = numel(found.model, trained=True)
    # Rank 128 between 3584 and the widths of q, k, v, o: 3584, 512, 512, 3584.
    assert trained == 28 * 128 * (4 * 3584 + 3584 + 2 * 512 + 3584)
    assert numel(found.model) - trained == 8_291_375_616  # what is published of the model
    assert numel(vision_tower(found.model)) == 675_759_104
    assert found.fits
