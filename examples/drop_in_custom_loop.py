"""A GRPO loop of one's own: the loss and its log-probs, with and without our kernels.

    python examples/drop_in_custom_loop.py

A tiny language model learns to say one token; the eager loss and `grpo_loss` of the same rollouts
agree at every step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regrpo_kernels import Objective, group_advantages, grpo_loss, token_log_probs

VOCAB, LENGTH, GROUPS, GROUP_SIZE, WANTED = 50, 12, 4, 8, 7
OBJECTIVE = Objective(epsilon_low=0.2, epsilon_high=0.28)


class TinyModel(nn.Module):
    """Each token from the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        self.head = nn.Linear(32, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))


@torch.no_grad()
def sample(model: TinyModel) -> Tensor:
    ids = torch.randint(0, VOCAB, (GROUPS, 1)).repeat_interleave(GROUP_SIZE, 0)
    for _ in range(LENGTH):
        probs = model(ids[:, -1:]).softmax(-1)[:, 0]
        ids = torch.cat([ids, torch.multinomial(probs, 1)], 1)
    return ids


def eager_loss(logits: Tensor, labels: Tensor, advantages: Tensor, old: Tensor) -> Tensor:
    log_probs = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    ratio = (log_probs - old).exp()
    a = advantages.unsqueeze(-1)
    return -torch.minimum(ratio * a, ratio.clamp(1 - 0.2, 1 + 0.28) * a).mean()


def main() -> None:
    torch.manual_seed(0)
    model = TinyModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    for step in range(10):
        ids = sample(model)
        inputs, labels = ids[:, :-1], ids[:, 1:]
        rewards = (labels == WANTED).float().sum(-1)
        advantages = group_advantages(rewards, GROUP_SIZE)
        with torch.no_grad():
            old = token_log_probs(model(inputs), labels).log_probs
        for _ in range(2):
            logits = model(inputs)
            out = grpo_loss(logits, labels, advantages, old_log_probs=old, objective=OBJECTIVE)
            eager = eager_loss(logits, labels, advantages, old).item()
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
        print(
            f"step {step}: reward {rewards.mean():.2f} of {LENGTH}, loss {out.loss:.6f} "
            f"(eager {eager:.6f}), entropy {out.metrics['entropy']:.3f}, "
            f"clipped {out.metrics['clip_ratio/region_mean']:.3f}"
        )


if __name__ == "__main__":
    main()
