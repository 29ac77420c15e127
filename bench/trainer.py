"""One update on the trajectories of a group: the model, the samples, and the ways of computing it.

An update is what an optimizer step waits for: log-probs of the reference and the gradient of the
clipped objective with its k3 KL, in every trained parameter. All ways get the same LoRA model, the
same samples and the same log-probs of the sampler.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from bench import eager
from bench.cases import GroupCase, UpdateCase
from bench.machine import DEVICE
from bench.measure import Call, Case, Provider
from bench.peers import installed
from regrpo.losses import packed_log_probs, policy_loss
from regrpo.modeling import head, hidden_states
from regrpo.packing import PackedBatch, collate
from regrpo.segments import TokenizedTrajectory
from regrpo_kernels import Objective, Segment

HIDDEN, LAYERS, HEADS, KEY_HEADS, INTERMEDIATE = 512, 8, 8, 2, 1408
LAYER_WEIGHTS = 2 * HIDDEN * (HIDDEN // HEADS) * (HEADS + KEY_HEADS) + 3 * HIDDEN * INTERMEDIATE
OBJECTIVE = Objective(epsilon_low=eager.EPSILON, epsilon_high=eager.EPSILON, beta=eager.BETA)


@dataclass(frozen=True)
class Sample:
    """One trajectory: its tokens, of which those from ``start`` on are trained."""

    ids: Tensor
    start: int
    old: Tensor  # log-probs of the trained tokens
    advantage: float


def build_base(case: GroupCase) -> Qwen2ForCausalLM:
    """A Qwen2 of 25 M parameters and its embeddings; the same weights every time."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=case.vocab,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).to(DEVICE, getattr(torch, case.dtype)).eval()


def build_model(case: GroupCase) -> Any:
    """The base with the adapter of the official release, as after some training."""
    lora = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(build_base(case), lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return adapted.eval()  # there is no dropout


class Update:
    """The samples of a case and a model."""

    def __init__(self, case: UpdateCase) -> None:
        self.case = case
        self.model = build_model(case)
        generator = torch.Generator().manual_seed(0)
        context = torch.randint(case.vocab, (case.context,), generator=generator)
        self.samples = []
        for length in case.tails:
            tail = torch.randint(case.vocab, (length,), generator=generator)
            advantage = torch.randn((), generator=generator).item()
            ids = torch.cat([context, tail])
            self.samples.append(Sample(ids, case.context, torch.zeros(length), advantage))
        batch = self.packed(share=True)
        with torch.no_grad():
            now = packed_log_probs(hidden_states(self.model, batch), *head(self.model), batch, 1.0)
        sampled = now[batch.loss_mask].cpu()
        sampled += 0.1 * torch.randn(len(sampled), generator=generator)
        self.samples = [
            replace(sample, old=old)
            for sample, old in zip(self.samples, sampled.split(case.tails), strict=True)
        ]
        self.expected: list[Tensor] = []

    def trained(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def restore(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def error(self, result: Any) -> float:
        """Relative distance from the gradient of the first way (ours, each token by itself)."""
        found = [p.grad for p in self.trained()]
        assert all(gradient is not None for gradient in found)
        flat = torch.cat([g.double().flatten() for g in found if g is not None])
        if not self.expected:
            self.expected = [flat]
        return ((flat - self.expected[0]).norm() / self.expected[0].norm()).item()

    def packed(self, share: bool) -> PackedBatch:
        rows = []
        for sample in self.samples:
            kinds = [int(Segment.CONTEXT)] * sample.start + [int(Segment.ACTION)] * len(sample.old)
            log_probs = [0.0] * sample.start + sample.old.tolist()
            rows.append(TokenizedTrajectory(sample.ids.tolist(), kinds, log_probs))
        batch = collate(rows, with_old_log_probs=True, share=share)
        lengths = batch.cu_seqlens.diff()
        advantages = torch.tensor([sample.advantage for sample in self.samples])
        return replace(batch, advantages=advantages.repeat_interleave(lengths)).to(DEVICE)


def ours(update: Update, share: bool) -> Call:
    """Packing is timed, too."""
    model = update.model

    def call() -> None:
        batch = update.packed(share)
        with torch.no_grad(), model.disable_adapter():
            reference = packed_log_probs(hidden_states(model, batch), *head(model), batch, 1.0)
        batch = replace(batch, ref_log_probs=reference)
        policy_loss(
            hidden_states(model, batch), *head(model), batch, OBJECTIVE, None
        ).loss.backward()

    return call


def official(update: Update, checkpointing: bool) -> Call:
    """The loop of the official trainer: a second model as the reference, for each trajectory and
    model a forward pass of the whole context, an fp32 log-softmax of every token over the
    vocabulary, one backward pass. Its default is activation checkpointing. The objective is ours,
    so that gradients can be compared.
    """
    policy, reference = update.model, build_base(update.case)
    count = sum(len(sample.old) for sample in update.samples)

    def log_probs(model: Any, ids: Tensor) -> Tensor:
        return eager.log_probs(model(ids[None], use_cache=False).logits[0, :-1], ids[1:])

    def call() -> None:
        if checkpointing:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
            policy.train()
        losses = []
        for sample in update.samples:
            ids, rows = sample.ids.to(DEVICE), slice(sample.start - 1, None)
            now = log_probs(policy, ids)[rows]
            with torch.no_grad():
                ref = log_probs(reference, ids)[rows]
            advantages = torch.full_like(now, sample.advantage)
            old, mask = sample.old.to(DEVICE), torch.ones_like(now)
            losses.append(eager.objective(now, advantages, old, ref, mask) * (len(now) / count))
        torch.stack(losses).sum().backward()
        policy.gradient_checkpointing_disable()
        policy.eval()

    return call


def grpo_trainer(model: Any, count: int, **options: Any) -> Any:
    """TRL's GRPOTrainer for steps of `count` samples that are here already."""
    from datasets import IterableDataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")),
        pad_token="a",
        eos_token="b",
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            tempfile.mkdtemp(),
            max_steps=1,
            per_device_train_batch_size=count,
            num_generations=count,
            use_cpu=DEVICE.type == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            **options,
        ),
        train_dataset=IterableDataset.from_generator(lambda: iter([{"prompt": "a"}])),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def trl(update: Update) -> Call:
    """TRL's GRPOTrainer from its scored samples on: log-probs of the reference, and its loss."""
    trainer = grpo_trainer(
        update.model,
        len(update.samples),
        beta=eager.BETA,
        epsilon=eager.EPSILON,
        use_bias_correction_kl=False,
        loss_type="bnpo",  # the mean over the trained tokens of the batch
    )
    tails = [sample.ids[sample.start :] for sample in update.samples]
    pad = torch.nn.utils.rnn.pad_sequence
    prompts = torch.stack([sample.ids[: sample.start] for sample in update.samples])
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": pad(tails, batch_first=True),
        "completion_mask": pad([torch.ones_like(t) for t in tails], batch_first=True),
        "old_per_token_logps": pad([s.old for s in update.samples], batch_first=True),
        "advantages": torch.tensor([s.advantage for s in update.samples]),
    }
    inputs = {name: value.to(DEVICE) for name, value in inputs.items()}

    def call() -> None:
        model = trainer.model
        ids, mask = (
            torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], dim=1)
            for name in ("ids", "mask")
        )
        with torch.no_grad(), model.disable_adapter():
            reference = trainer._get_per_token_logps_and_entropies(
                model, ids, mask, inputs["completion_ids"].shape[1]
            )[0]
        trainer.compute_loss(model, {**inputs, "ref_per_token_logps": reference}).backward()

    return call


def flops(case: UpdateCase, shared: bool) -> int:
    """Floating-point operations that an update takes at least, by the matmuls.

    Forward of the reference, forward of the policy, the gradient of its activations (nothing else
    of the base is trained), each 2 a weight and token; scores and values, 4 a pair and channel,
    and 2.5 times that backward; the head on trained tokens.
    """
    copies = 1 if shared else len(case.tails)
    computed = copies * case.context + sum(case.tails)
    pairs = copies * case.context**2 / 2 + sum(t * (case.context + t / 2) for t in case.tails)
    attention = LAYERS * HIDDEN * 4 * pairs * (2 + 2.5)
    body = 3 * 2 * LAYERS * LAYER_WEIGHTS * computed
    return round(body + attention + 3 * 2 * sum(case.tails) * case.vocab * HIDDEN)


def update_measurement(update: Update) -> tuple[Case, list[Provider]]:
    """Ours comes first in the table; the expected gradient is that of ours unshared, made here."""
    case = update.case
    ours(update, share=False)()
    update.error(None)
    update.restore()
    second = sum(p.nbytes for p in update.model.get_base_model().parameters())
    # what backward finds of every trajectory: log-softmax, and while it runs two gradients
    logits = 4 * case.vocab * case.tokens
    providers = [
        Provider("ours shared", "ours", lambda: ours(update, share=True)),
        Provider("ours unshared", "unshared", lambda: ours(update, share=False)),
        Provider(
            "official loop",
            "eager",
            lambda: official(update, checkpointing=True),
            logits,
            note="two models, activation checkpointing",
            held=second,
        ),
        Provider(
            "official loop, all activations",
            "eager",
            lambda: official(update, checkpointing=False),
            logits,
            note="two models",
            held=second,
        ),
    ]
    if installed("trl"):
        note = "GRPOTrainer's loss from scored samples on"
        providers.append(Provider("trl", "peer", lambda: trl(update), note=note))
    for provider in providers:
        provider.flops = flops(case, shared=provider.name == "ours shared")
    record = {
        "op": "update",
        "shape": case.shape,
        "tokens": case.tokens,
        "vocab": case.vocab,
        "hidden": HIDDEN,
        "dtype": case.dtype,
        "share": sum(case.tails) / case.tokens,
        "variant": "",
        "logits_bytes": case.tokens * case.vocab * 4,
    }
    return Case(update.restore, update.error, 1e-3, record, case.once), providers
