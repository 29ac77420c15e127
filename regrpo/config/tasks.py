"""Which tasks are generated."""

from dataclasses import dataclass

from regrpo.tasks import FAMILIES, Task, generate_tasks


@dataclass(frozen=True)
class TaskConfig:
    """Which tasks are generated.

    Args:
        seed: tasks of different seeds are different.
        hops: least and most hops of a serial repair.
        tail: probability that a repair takes a further hop, again and again, up to seven.
        trap_share: how often the call that the wording suggests fails.
        families: task families.
    """

    seed: int = 0
    hops: tuple[int, int] = (1, 3)
    tail: float = 0.0
    trap_share: float = 0.65
    families: tuple[str, ...] = tuple(FAMILIES)

    def __post_init__(self) -> None:
        self.generate(0)

    def generate(self, count: int, first: int = 0) -> list[Task]:
        """The tasks ``first`` to ``first + count - 1``."""
        return generate_tasks(
            count,
            first=first,
            seed=self.seed,
            hops=self.hops,
            tail=self.tail,
            trap_share=self.trap_share,
            families=self.families,
        )
