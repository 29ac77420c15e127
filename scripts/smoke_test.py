"""What scripts/check_package.sh runs in an environment that holds the wheel and nothing else of
this repository: the kernels against the reference, and the data files.
"""

from importlib.resources import files

import torch

import regrpo
import regrpo.agent
import regrpo_kernels
from regrpo_kernels import Objective, group_advantages, grpo_loss


def loss_and_gradient(impl: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(12, 1003, generator=g)).requires_grad_()
    labels = torch.randint(1003, (12,), generator=g)
    labels[5] = -100
    out = grpo_loss(
        logits,
        labels,
        group_advantages(torch.tensor([1.0, 0.0, 1.0, 0.0]), 2),
        cu_seqlens=torch.tensor([0, 3, 5, 9, 12], dtype=torch.int32),
        old_log_probs=-7 + torch.randn(12, generator=g) / 4,
        objective=Objective(epsilon_high=0.28, entropy_coef=0.01),
        impl=impl,
    )
    out.loss.backward()
    assert logits.grad is not None
    return out.loss.detach(), logits.grad


def main() -> None:
    expected = loss_and_gradient("reference")
    assert expected[1].abs().sum() > 0
    torch.testing.assert_close(loss_and_gradient("cpu"), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss_and_gradient(None), loss_and_gradient("cpu"), rtol=0, atol=0)
    for package, names in (
        (regrpo, ("py.typed", "run_page.css", "run_page.js")),
        (regrpo_kernels, ("py.typed", "_C.pyi")),
    ):
        for name in names:
            assert files(package).joinpath(name).is_file(), f"{package.__name__}/{name}"
    print("smoke test: ok,", regrpo.__file__)


if __name__ == "__main__":
    main()
