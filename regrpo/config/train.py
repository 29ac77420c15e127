"""Reinforcement learning."""

from dataclasses import dataclass, field

from regrpo.config.checks import require
from regrpo.config.options import OptionsConfig
from regrpo.config.rewards import RewardConfig
from regrpo.config.rollout import RolloutConfig
from regrpo.config.run import LoraSettings, OptimConfig, check_execution, check_logging
from regrpo.config.tasks import TaskConfig
from regrpo.config.trigger import TriggerConfig

# Of an offline group; see regrpo.data_engine.contrast.
CANDIDATES = (
    "one_shot",
    "plain_retry",
    "recovery",
    "failed_recovery",
    "long_recovery",
    "bare_recovery",
)


@dataclass(frozen=True)
class TrainConfig:
    """ReGRPO: on-policy on local trajectories or episodes, or offline on fixed candidates.

    Args:
        model: Hugging Face name or path, usually of an SFT run.
        out: folder of the run.
        mode: "local", one step from a state; "episodes", whole tasks; "offline", as the official
            release: the fixed, executed candidates of a state and nothing sampled.
        tasks: where states come from.
        reflect: open a reflection block after a typed failure; False is GRPO with plain retries.
        trigger: what else opens one.
        steps: updates.
        states: states an update, of all processes together.
        group_size: trajectories a state (K).
        candidates: of a state offline, group_size of them: one_shot, plain_retry, recovery,
            failed_recovery, long_recovery, bare_recovery; the official release has all but
            long_recovery.
        forced_share: share of the states that start behind an executed near-miss; an offline group
            always holds one.
        own_states_share: share of the states that are turns of whole episodes that the policy runs
            first; needs mode "local".
        max_steps: of an episode: tool calls, corrections not counted.
        zero_variance: groups without any advantage: "keep" them (what they add is the KL term),
            "skip" them, or "resample": draw new states for groups that all succeed or all fail,
            and skip what is left.
        resample_rounds: draws of new states an update, at most.
        epochs: passes over the trajectories of an update.
        batch_tokens: tokens of one forward and backward pass, at most, those that trajectories of a
            group share counted once; an update adds the passes up.
        temperature: of sampling and of the loss.
        max_new_tokens: limit of one turn.
        rollout: where trajectories are sampled.
        policy: objective of a token: "clip", "cispo" or "sapo" by ratios to the policy that
            sampled, or "reinforce", -A log pi, as the official release; the only one offline, where
            there is nothing to take a ratio to.
        epsilon_low: lower clip bound of the ratio.
        epsilon_high: upper clip bound of the ratio.
        beta: weight of the KL to the starting model.
        kl_estimator: k1, k2 or k3; "k1-constant" is k1 as the official release differentiates it,
            with the constant gradient beta * grad log pi, an advantage lower by beta. It does not
            depend on the reference and holds nothing near it; needs policy "reinforce".
        loss_agg_mode: how token losses are averaged.
        reward: the reward.
        options: options from neighbouring work.
        optim: the optimizer.
        lora: adapter settings.
        dtype: of the computation: "float32", "bfloat16", or "auto", what the model is saved in;
            weights that are trained are float32 in any case.
        gradient_checkpointing: keep the activations of layer boundaries only and compute the rest
            again in the backward pass.
        parallel: of several processes: "ddp", each has the whole model, or "fsdp", they share it.
        save_every: updates between checkpoints.
        keep_checkpoints: the newest checkpoints, so many, are kept.
        log_to: "wandb", "trackio" or both, beside metrics.jsonl and TensorBoard.
        log_trajectories_every: updates from one to the next of which trajectories are stored for
            `regrpo report`; 0 stores none.
        log_groups: groups that are stored of such an update.
        seed: sampling, tasks and order.
    """

    model: str
    out: str
    mode: str = "local"
    tasks: TaskConfig = field(default_factory=lambda: TaskConfig(seed=1, hops=(2, 7)))
    reflect: bool = True
    trigger: TriggerConfig = field(default_factory=TriggerConfig)
    steps: int = 100
    states: int = 24
    group_size: int = 5
    candidates: tuple[str, ...] = CANDIDATES[:5]
    forced_share: float = 0.4
    own_states_share: float = 0.0
    max_steps: int = 6
    zero_variance: str = "skip"
    resample_rounds: int = 3
    epochs: int = 1
    batch_tokens: int = 16384
    temperature: float = 1.0
    max_new_tokens: int = 96
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    policy: str = "clip"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 0.03
    kl_estimator: str = "k3"
    loss_agg_mode: str = "token-mean"
    reward: RewardConfig = field(default_factory=RewardConfig)
    options: OptionsConfig = field(default_factory=OptionsConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-4))
    lora: LoraSettings = field(default_factory=LoraSettings)
    dtype: str = "float32"
    gradient_checkpointing: bool = False
    parallel: str = "ddp"
    save_every: int = 25
    keep_checkpoints: int = 2
    log_to: tuple[str, ...] = ()
    log_trajectories_every: int = 10
    log_groups: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.steps > 0, "steps", self.steps, "1 or more")
        require(self.states > 0, "states", self.states, "1 or more")
        require(self.group_size > 1, "group_size", self.group_size, "2 or more")
        require(0 <= self.forced_share <= 1, "forced_share", self.forced_share, "between 0 and 1")
        choices = ("keep", "skip", "resample")
        require(
            self.zero_variance in choices,
            "zero_variance",
            self.zero_variance,
            "keep, skip or resample",
        )
        rounds = self.resample_rounds
        require(rounds > 0, "resample_rounds", rounds, "1 or more")
        keep, mode = self.options.keep, self.loss_agg_mode
        size = self.group_size
        require(keep is None or keep <= size, "options.keep", keep, f"at most group_size={size}")
        # Its weights are those of the sequences that have one ratio each.
        require(
            self.options.ratio_level != "segment" or mode != "seq-mean-token-mean",
            "loss_agg_mode",
            mode,
            "another one with options.ratio_level=segment",
        )
        require(self.epochs > 0, "epochs", self.epochs, "1 or more")
        require(self.temperature > 0, "temperature", self.temperature, "a positive number")
        fits = self.rollout.backend == "local" or self.rollout.processed_log_probs
        needed = "1 with rollout.backend=server, or rollout.processed_log_probs"
        require(self.temperature == 1 or fits, "temperature", self.temperature, needed)
        require(self.max_new_tokens > 0, "max_new_tokens", self.max_new_tokens, "1 or more")
        require(self.beta >= 0, "beta", self.beta, "0 or more")
        require(self.save_every > 0, "save_every", self.save_every, "1 or more")
        self.trigger.require_reflect(self.reflect)
        self._require_fitting_mode()
        check_execution(self.dtype, self.parallel)
        check_logging(self.log_to, self.keep_checkpoints)
        every = self.log_trajectories_every
        require(every >= 0, "log_trajectories_every", every, "0 or more")
        require(self.log_groups > 0, "log_groups", self.log_groups, "1 or more")

    def _require_fitting_mode(self) -> None:
        modes = ("local", "episodes", "offline")
        policies = ("clip", "cispo", "sapo", "reinforce")
        estimators = ("k1", "k2", "k3", "k1-constant")
        policy = self.policy
        require(self.mode in modes, "mode", self.mode, "local, episodes or offline")
        require(policy in policies, "policy", policy, "clip, cispo, sapo or reinforce")
        estimator = self.kl_estimator
        require(estimator in estimators, "kl_estimator", estimator, "k1, k2, k3 or k1-constant")
        own = self.own_states_share
        require(
            own >= 0 and own + self.forced_share <= 1 + 1e-9,
            "own_states_share",
            own,
            f"0 or more, and with forced_share={self.forced_share:g} at most 1",
        )
        require(own == 0 or self.mode == "local", "own_states_share", own, "0 but in mode local")
        require(self.max_steps > 0, "max_steps", self.max_steps, "1 or more")
        if estimator == "k1-constant":
            needed = "reinforce with kl_estimator k1-constant"
            require(policy == "reinforce", "policy", policy, needed)
        if self.mode == "offline":
            needed = "reinforce with mode offline, which has no old log-probs"
            require(policy == "reinforce", "policy", policy, needed)
            needed = "true with mode offline, whose candidates reflect"
            require(self.reflect, "reflect", self.reflect, needed)
            names = self.candidates
            known = len(set(names)) == len(names) and set(names) <= set(CANDIDATES)
            require(known, "candidates", names, f"different ones of {', '.join(CANDIDATES)}")
            needed = f"the number of candidates, {len(names)}, with mode offline"
            require(self.group_size == len(names), "group_size", self.group_size, needed)
            for name, value, off in (
                ("zero_variance", self.zero_variance == "resample", "keep or skip"),
                ("rollout.backend", self.rollout.backend != "local", "local"),
                ("trigger.confidence_margin", self.trigger.confidence_margin, "null"),
                ("options.replay", self.options.replay, "0"),
                ("options.refinements", self.options.refinements, "0"),
                ("options.clip_target", self.options.clip_target, "null"),
                ("options.ratio_level", self.options.ratio_level != "token", "token"),
            ):
                require(not value, name, value, f"{off} with mode offline, which samples nothing")
