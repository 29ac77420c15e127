"""What two processes do for ``test_distributed.py``; started by torchrun, once for many checks.

``updates`` runs in one process as well, which gives what is expected.
"""

import os
import pickle
import random
import signal
import sys
from functools import partial
from pathlib import Path

import torch
from runs import rl_config, sft_config

import regrpo.losses
from regrpo.cli import main
from regrpo.config import LoraSettings, OptimConfig, OptionsConfig, TrainConfig
from regrpo.distributed import ALONE, Ranks
from regrpo.environment import LocalEnvironment
from regrpo.errors import RunError
from regrpo.learner import Learner
from regrpo.modeling import base_model, load_model, load_tokenizer
from regrpo.packed_model import PackedModel
from regrpo.packing import blank
from regrpo.rl import run_rl, update
from regrpo.rollout import Trajectory, TurnRecord, task_start
from regrpo.segments import TokenizedTrajectory
from regrpo.sft import run_sft
from regrpo.sharding import release, shard, whole
from regrpo.tasks import generate_tasks
from regrpo.tools import Observation, Status
from regrpo.trainer import Run
from regrpo_kernels import Segment, linear_grpo_loss

# Outcomes of five groups, and which of them each process has.
GROUPS = ([1, 0, 0, 1], [1, 1, 1, 1], [0, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0])
SPLITS = {
    "uneven": ([0, 1, 2], [3, 4]),
    "no variance": ([0, 2, 3], [1, 4]),
    "no groups": ([0, 1, 2, 3, 4], []),
    "nothing learned": ([1], [4]),
}
SETTINGS = {
    "plain": {"beta": 0.05},
    "sequences": {"beta": 0.05, "loss_agg_mode": "seq-mean-token-mean"},
    "float64": {"beta": 0.0},
    "options": {
        "beta": 0.05,
        "options": OptionsConfig(clip_target=0.9, demonstration_weight=0.1, keep=3),
    },
    "bfloat16 lora": {"beta": 0.05, "lora": LoraSettings(rank=2)},
}
CASES = [
    (setting, split)
    for setting in SETTINGS
    for split in SPLITS
    if setting in ("plain", "options") or split == "uneven"
]


class Interrupted(Exception):
    pass


def trajectories():
    """Five groups that share a context each; the same in every process."""
    rng = random.Random(4)
    starts = [task_start(task) for task in generate_tasks(len(GROUPS), seed=0)]
    turn = TurnRecord(0, "", Observation("", Status.OK), False, 0)
    groups = []
    for start, outcomes in zip(starts, GROUPS, strict=True):
        context = [rng.randrange(3, 200) for _ in range(20)]
        group = []
        for success in outcomes:
            trained = [rng.randrange(3, 200) for _ in range(rng.randrange(8, 20))]
            kinds = [int(Segment.CONTEXT)] * 20 + [int(Segment.ACTION)] * len(trained)
            old = [0.0] * 20 + [-4 - 4 * rng.random() for _ in trained]
            tokens = TokenizedTrajectory(context + trained, kinds, old)
            group.append(Trajectory(start, tokens, [turn], success=bool(success)))
        groups.append(group)
    return groups


def updates(base, out, parallel="ddp", ranks=ALONE):
    """Gradients and metrics of an update, by setting and split."""
    results = {}
    groups = trajectories()
    for setting, split in CASES:
        options, shares = SETTINGS[setting], SPLITS[split]
        members = [i for share in shares for i in share]
        own = members if ranks.size == 1 else shares[ranks.rank]
        config = TrainConfig(
            model=str(base / "random"),
            out=str(out / f"{parallel} {setting} {split}"),
            steps=1,
            save_every=10,
            states=len(GROUPS),
            group_size=4,
            batch_tokens=110,  # a group, and hardly two
            optim=OptimConfig(lr=1e-9, grad_clip=1e30),
            parallel=parallel,
            **options,
        )
        low = setting == "bfloat16 lora"
        dtype = {"float64": torch.float64, "bfloat16 lora": torch.bfloat16}.get(setting)
        torch.manual_seed(0)
        model = load_model(
            config.model, dtype=dtype or torch.float32, lora_rank=config.lora.rank
        ).eval()
        packed = PackedModel(
            model, dtype=dtype if low else None, gradient_checkpointing=setting == "sequences"
        )
        if ranks.size > 1 and parallel == "fsdp":
            shard(packed, base_model(model), packed.dtype)
            with torch.no_grad():
                packed(blank())
            release(packed)
        learner = Learner(model, config, packed=packed, ranks=ranks)
        with torch.no_grad():  # away from the reference, so that there is a KL
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.05).add_(0.01)
        gradients = {}

        def keep(*_, model=model, gradients=gradients):
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    gradients[name] = whole(parameter.grad).clone()

        impl = "reference" if dtype == torch.float64 else None
        regrpo.losses.linear_grpo_loss = partial(linear_grpo_loss, impl=impl)
        tokenizer = load_tokenizer(config.model)
        with Run(config.out, config, model, tokenizer, config.optim, 1, ranks=ranks) as training:
            training.optimizer.register_step_pre_hook(keep)
            flat = [t for i in own for t in groups[i]]
            metrics = update(training, learner, flat)
        results[setting, split] = gradients, metrics
    return results


def configs(base, out):
    """Runs of two processes; the first two are interrupted and go on."""
    options = OptionsConfig(replay=8, repeat_after=2, refinements=1)
    lora = LoraSettings(rank=2)
    return {
        "rl": rl_config(base, out / "rl", states=3, options=options),
        "fsdp": sft_config(
            base, out / "fsdp", parallel="fsdp", lora=lora, gradient_checkpointing=True
        ),
        "ddp": sft_config(base, out / "ddp", micro_batch_tokens=1024, dtype="bfloat16"),
        "one": sft_config(base, out / "one", parallel="fsdp", batch_tokens=300, max_length=300),
        "rl fsdp": rl_config(base, out / "rl fsdp", states=3, options=options, parallel="fsdp"),
    }


def train(config, ranks):
    if isinstance(config, TrainConfig):
        with LocalEnvironment() as environment:
            return run_rl(config, environment, ranks=ranks)
    return run_sft(config, ranks=ranks)


def stop_at(step, how):
    """Makes a run do something before it counts a step."""
    finish = Run.finish_step

    def finish_step(self, save_every):
        if self.step == step:
            how()
        finish(self, save_every)

    Run.finish_step = finish_step
    return finish


def interrupted(base, out, ranks):
    """A run that an exception stops, and one in which a process is killed."""

    def stop():
        raise Interrupted

    def kill():
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    runs = configs(base, out)
    finish = stop_at(3, stop)
    try:
        train(runs["fsdp"], ranks)
    except Interrupted:
        pass
    else:
        raise AssertionError("the run was not interrupted")
    Run.finish_step = finish
    stop_at(5, kill)
    train(runs["rl"], ranks)


def written_by_this_process(folder):
    """Paths in a folder that are opened for writing, made, moved or removed from now on."""
    paths = []

    def audit(event, arguments):
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            path = arguments[0] if arguments else ""
            writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if writes and str(path).startswith(str(folder)):
            paths.append((event, str(path)))

    sys.addaudithook(audit)
    return paths


def everything(base, out, ranks):
    paths = written_by_this_process(out)
    results = {p: updates(base, out / "updates", p, ranks) for p in ("ddp", "fsdp")}
    for config in configs(base, out).values():  # two of them go on from where they stopped
        train(config, ranks)
    for name, config in configs(base, out / "whole").items():
        if name in ("rl", "fsdp"):
            train(config, ranks)
    found = ranks.gather(paths)
    if ranks.main:
        (out / "results.pickle").write_bytes(pickle.dumps((results, found)))


def one_fails(base, out, ranks):
    """Rank 1 cannot go on, while rank 0 waits for it."""

    def fail():
        if ranks:
            raise RunError("the tools are gone")

    stop_at(1, fail)
    config = sft_config(base, out / "fails")
    main(
        [
            *("sft", "--model", config.model, "--out", config.out),
            *("--data", f'[{{"path": "{config.data[0].path}"}}]'),
        ]
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    task, base, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if task == "one_fails":
        one_fails(base, out, int(os.environ["RANK"]))
    else:
        with Ranks.from_environment() as ranks:
            {"interrupted": interrupted, "everything": everything}[task](base, out, ranks)
