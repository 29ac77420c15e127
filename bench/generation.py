"""Two turns of a group's trajectories with an observation between them, each turn forced to its
length: ours, with keys and values kept through the observation, and transformers' ``generate``
called turn by turn.

Everything samples at temperature 1 from the same LoRA model, without a stop token. Ours returns the
log-probs of what it sampled, which are compared with a packed forward pass; ``generate`` returns
tokens only, since its caller would compute log-probs afterwards.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from bench.cases import GenerationCase
from bench.machine import DEVICE
from bench.measure import Call, Case, Provider
from bench.trainer import build_model
from regrpo.losses import packed_log_probs
from regrpo.modeling import head, hidden_states
from regrpo.packing import collate
from regrpo.sampling import LocalSession
from regrpo.segments import TokenizedTrajectory
from regrpo_kernels import Segment

PAD = 0


class Rollout:
    """The model of a case, the context of its group, and what the tool says to each trajectory."""

    def __init__(self, case: GenerationCase) -> None:
        self.case = case
        self.model = build_model(case)
        generator = torch.Generator().manual_seed(0)

        def tokens(count: int) -> list[int]:
            return torch.randint(1, case.vocab, (count,), generator=generator).tolist()

        context = tokens(case.context)
        self.prompts = [list(context) for _ in range(case.group)]
        self.observations = [tokens(count) for count in case.observations]

    def restore(self) -> None:
        """Both sample anew at every call; nothing is left behind."""

    def error(self, result: list[TokenizedTrajectory]) -> float:
        """Largest distance of a log-prob from that of a packed forward pass, over their mean;
        infinite where a trajectory does not have its length."""
        expected = [
            self.case.context + 2 * self.case.turn + len(observation)
            for observation in self.observations
        ]
        if [len(row) for row in result] != expected:
            return math.inf
        if not any(any(row.log_probs) for row in result):
            return 0.0  # tokens only
        batch = collate(result, with_old_log_probs=True, share=True).to(DEVICE)
        with torch.no_grad():
            hidden = hidden_states(self.model, batch)
        now = packed_log_probs(hidden, *head(self.model), batch, 1.0)[batch.loss_mask]
        assert batch.old_log_probs is not None
        then = batch.old_log_probs[batch.loss_mask]
        return ((now - then).abs().max() / now.abs().mean()).item()


def ours(rollout: Rollout, keep: bool) -> Call:
    def call() -> list[TokenizedTrajectory]:
        numbers = range(len(rollout.prompts))
        rows = [TokenizedTrajectory() for _ in numbers]
        for row, prompt in zip(rows, rollout.prompts, strict=True):
            row.extend(prompt, Segment.CONTEXT)
        session = LocalSession(
            rollout.model,
            stop_ids=(-1,),
            pad_id=PAD,
            temperature=1.0,
            max_new_tokens=rollout.case.turn,
            generator=torch.Generator(DEVICE).manual_seed(0),
            cache_bytes=2**62 if keep else 0,
        )
        for turn in range(2):
            samples = session.generate([row.input_ids for row in rows], numbers)
            for row, sample, seen in zip(rows, samples, rollout.observations, strict=True):
                row.extend(sample.ids, Segment.ACTION, sample.log_probs)
                if turn == 0:
                    row.extend(seen, Segment.OBSERVATION)
        return rows

    return call


def transformers_generate(rollout: Rollout) -> Call:
    """The whole group as a batch, padded on the left, with transformers' own cache in a turn."""
    model: Any = rollout.model

    def generate(rows: list[list[int]], limit: int) -> list[list[int]]:
        longest = max(map(len, rows))
        ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows], device=DEVICE)
        mask = torch.tensor(
            [[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=DEVICE
        )
        settings = GenerationConfig(
            max_new_tokens=limit,
            min_new_tokens=limit,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=PAD,
            eos_token_id=None,
            bos_token_id=None,
        )
        out: Tensor = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        return out[:, longest:].tolist()

    def call() -> list[TokenizedTrajectory]:
        rows = [list(prompt) for prompt in rollout.prompts]
        for turn in range(2):
            said = generate(rows, rollout.case.turn)
            for row, ids, seen in zip(rows, said, rollout.observations, strict=True):
                row += [*ids, *(seen if turn == 0 else [])]
        kinds = [[int(Segment.CONTEXT)] * len(row) for row in rows]
        return [
            TokenizedTrajectory(row, kind, [0.0] * len(row))
            for row, kind in zip(rows, kinds, strict=True)
        ]

    return call


def generation_measurement(rollout: Rollout) -> tuple[Case, list[Provider]]:
    """Ours comes first in the table; ``tokens`` of a record are the sampled ones."""
    case = rollout.case
    providers = [
        Provider("ours", "ours", lambda: ours(rollout, keep=True)),
        Provider(
            "ours, nothing kept",
            "unshared",
            lambda: ours(rollout, keep=False),
            note="contexts computed again at the second turn",
        ),
        Provider(
            "transformers generate",
            "peer",
            lambda: transformers_generate(rollout),
            note="turn by turn; no log-probs",
        ),
    ]
    record = {
        "op": "generation",
        "shape": case.shape,
        "tokens": 2 * case.group * case.turn,
        "vocab": case.vocab,
        "dtype": case.dtype,
        "share": 1.0,
        "variant": "",
        "logits_bytes": 4 * case.vocab * case.group,
    }
    tolerance = 1e-3 if case.dtype == "float32" else 0.2
    return Case(rollout.restore, rollout.error, tolerance, record), providers
