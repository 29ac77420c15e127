"""Nothing that a peer accepts is ignored: its arguments are ours, each of them changes the result,
is one that only tunes the peer's memory, or is refused by name.
"""

import inspect
import re

import pytest
import torch
from loss_types64 import batch
from test_trl import make_trainer
from test_verl import batch as verl_batch
from test_verl import config

from regrpo_kernels.compat import liger, trl_trainer
from regrpo_kernels.compat import trl as ours_trl
from regrpo_kernels.compat import verl as ours_verl


def parameters(function):
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


# --- Liger (test_liger.py compares the signatures themselves) -------------------------------------

# another value of each argument, and the options with which it matters
CHANGED = {
    "advantages": (torch.ones(3), {}),
    "temperature": (0.5, {}),
    "beta": (0.3, {}),
    "eps_low": (0.01, {}),
    "eps_high": (0.01, {}),
    "loss_type": ("grpo", {}),
    "max_completion_length": (3, {"loss_type": "dr_grpo"}),
    "importance_sampling_level": ("sequence", {}),
    "sapo_temperature_pos": (2.0, {"loss_type": "sapo"}),
    "sapo_temperature_neg": (2.0, {"loss_type": "sapo"}),
    "vllm_is_ratio": (torch.rand(3, 7) + 0.3, {}),
    "delta": (1.01, {}),
    "use_bias_correction_kl": (True, {}),
    "num_items_in_batch": (3.0, {}),
    "vespo_k_pos": (1.0, {"loss_type": "vespo"}),
    "vespo_lambda_pos": (1.0, {"loss_type": "vespo"}),
    "vespo_k_neg": (1.0, {"loss_type": "vespo"}),
    "vespo_lambda_neg": (1.0, {"loss_type": "vespo"}),
}
FROM_LOGITS = {
    **CHANGED,
    "old_logp": (None, {}),
    "ref_logp": (torch.zeros(3, 7), {}),
    "completion_ids": (torch.zeros(3, 7, dtype=torch.int64), {}),
    "completion_mask": (None, {}),
}
FROM_HIDDEN_STATES = {
    **{
        {"eps_low": "epsilon_low", "eps_high": "epsilon_high"}.get(x, x): y
        for x, y in CHANGED.items()
    },
    "lin_weight": (torch.ones(33, 5), {}),
    "bias": (torch.arange(33.0), {}),
    "selected_token_ids": (torch.zeros(3, 7, dtype=torch.int64), {}),
    "attention_mask": (torch.ones(3, 7, dtype=torch.int64), {}),
    "old_per_token_logps": (None, {}),
    "ref_per_token_logps": (torch.zeros(3, 7), {}),
    "use_ref_model": (False, {"ref_per_token_logps": None}),
    "ref_input": (torch.zeros(3, 7, 5), {"ref_per_token_logps": None}),
    "ref_weight": (torch.ones(33, 5), {"ref_per_token_logps": None}),
    "ref_bias": (torch.arange(33.0), {"ref_per_token_logps": None}),
}


def loss_from_logits(**changes):
    data = batch()
    call = {
        "logits": data["logits"],
        "old_logp": data["old"],
        "ref_logp": data["ref"],
        "completion_ids": data["ids"],
        "advantages": data["advantages"],
        "completion_mask": data["mask"],
        "reduce": True,
        **changes,
    }
    return liger.triton_grpo_loss(**call)[0]


def loss_from_hidden_states(**changes):
    data = batch(hidden=5)
    call = {
        "_input": data["hidden"],
        "lin_weight": data["weight"],
        "selected_token_ids": data["ids"],
        "attention_mask": data["mask"],
        "advantages": data["advantages"],
        "bias": data["bias"],
        "ref_per_token_logps": data["ref"],
        "old_per_token_logps": data["old"],
        "ref_input": data["hidden"] if "ref_per_token_logps" in changes else None,
        "ref_weight": data["weight"] / 2,
        "max_completion_length": 9,
        "temperature": 0.9,
        **changes,
    }
    options = [name for name, _ in parameters(liger.LigerFusedLinearGRPOLoss)]
    module = liger.LigerFusedLinearGRPOLoss(**{x: call.pop(x) for x in options if x in call})
    return module(**call)[0]


@pytest.mark.parametrize("name", FROM_LOGITS)
def test_an_argument_of_ligers_loss_changes_the_result(name):
    value, options = FROM_LOGITS[name]
    assert loss_from_logits(**options, **{name: value}) != loss_from_logits(**options)


@pytest.mark.parametrize("name", FROM_HIDDEN_STATES)
def test_an_argument_of_ligers_module_changes_the_result(name):
    value, options = FROM_HIDDEN_STATES[name]
    found = loss_from_hidden_states(**options, **{name: value})
    assert found != loss_from_hidden_states(**options)


def test_no_argument_of_ligers_was_left_out_above():
    names = {name for name, _ in parameters(liger.triton_grpo_loss)}
    # "reduce" changes what is returned and "inplace" where the gradient is: test_liger.py
    assert names - set(FROM_LOGITS) == {"logits", "inplace", "reduce"}
    names = {name for name, _ in parameters(liger.LigerFusedLinearGRPOLoss)}
    names |= {name for name, _ in parameters(liger.LigerFusedLinearGRPOLoss.forward)}
    assert names - set(FROM_HIDDEN_STATES) == {"self", "_input", "compiled", "chunk_size"}


# --- TRL ------------------------------------------------------------------------------------------

# What TRL's loss reads and ours does not: its metrics, what only losses that stay TRL's own read
# (an entropy bonus, masks by entropy or policy, VESPO), and a router loss, refused when patching.
TRLS_OWN = {
    "_entropy_window_stats",
    "_get_per_token_logps_and_entropies",
    "_last_world_entropy",
    "_metrics",
    "args.entropy_coef_delta",
    "args.entropy_coef_max",
    "args.entropy_coef_min",
    "args.entropy_target",
    "args.vespo_k_neg",
    "args.vespo_k_pos",
    "args.vespo_lambda_neg",
    "args.vespo_lambda_pos",
    "entropy_coef",
    "get_gamma_weights",
    "get_high_entropy_mask",
    "get_off_policy_mask",
    "router_aux_loss_coef",
    "use_adaptive_entropy",
}


@pytest.fixture
def trl():
    return pytest.importorskip("trl")


def test_trls_loss_reads_no_option_that_ours_does_not_know(trl):
    def read(source, name):
        return set(re.findall(rf"\b{name}\.((?:args\.)?\w+)", inspect.getsource(source)))

    theirs = read(trl.GRPOTrainer._compute_loss, "self")
    assert "epsilon_low" in theirs
    assert theirs - read(trl_trainer, "trainer") <= TRLS_OWN


def test_arguments_of_trls_functions_are_ours(trl):
    utils = pytest.importorskip("trl.trainer.utils")
    kernels = pytest.importorskip("trl.kernels")
    for name in ("selective_log_softmax", "entropy_from_logits"):
        assert parameters(getattr(ours_trl, name)) == parameters(getattr(utils, name))
    _context, *theirs = parameters(kernels.ChunkedLogProbFunction.forward)
    *found, outputs = parameters(ours_trl.chunked_log_probs)
    assert found == theirs[:-1]
    # ours has one of the outputs that TRL's default asks for
    assert (outputs[0], theirs[-1][0]) == ("outputs", "outputs")
    rows = (torch.zeros(2, 3), torch.zeros(4, 3), None, torch.zeros(2, dtype=torch.int64), 1.0, 8)
    for name in set(theirs[-1][1]) - {"entropy"}:
        with pytest.raises(ValueError, match=name):
            ours_trl.chunked_log_probs(*rows, outputs=(name,))


def test_arguments_of_trls_forward_are_ours_or_refused(trl, tmp_path):
    trainer = make_trainer(tmp_path)
    theirs = inspect.signature(trainer.model.forward, follow_wrapped=False).parameters.values()
    names = {p.name for p in theirs if p.kind is p.KEYWORD_ONLY or p.default is not p.empty}
    assert names >= {"fused_lm_head", "labels"}
    ours_trl.patch_grpo_trainer(trainer)
    ids = torch.ones(1, 3, dtype=torch.int64)
    for name in names - {"fused_lm_head", "labels"}:
        with pytest.raises(ValueError, match=name):
            trainer.model(input_ids=ids, labels=ids, fused_lm_head=True, **{name: ids})


# --- verl -----------------------------------------------------------------------------------------

VERLS = {"clip": "vanilla", "gspo": "gspo", "sapo": "sapo", "cispo": "cispo"}


@pytest.fixture
def core():
    return pytest.importorskip("verl.trainer.ppo.core_algos")


@pytest.mark.parametrize("policy", VERLS)
def test_arguments_and_options_of_verls_losses_are_ours(core, policy):
    from verl.workers.config import ActorConfig

    class Recording(ActorConfig):
        def __getattribute__(self, name):
            if name in ActorConfig.__dataclass_fields__:
                read.add(name)
            return super().__getattribute__(name)

    theirs, found = core.get_policy_loss_fn(VERLS[policy]), ours_verl.policy_loss_fn(policy)
    assert [name for name, _ in parameters(found)] == [name for name, _ in parameters(theirs)]
    read = set()
    options = Recording(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=None,  # so that clip_ratio is read
        clip_ratio_high=None,
    )
    old, log_prob, advantages, mask, _ = verl_batch()
    results, reads = [], []
    for function in (theirs, found):
        read.clear()
        # without loss_agg_mode, of which each loss has its own default
        results.append(function(old, log_prob, advantages, mask, config=options)[0])
        reads.append(set(read))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert reads[0]
    assert reads[0] <= reads[1]


def test_arguments_of_verls_aggregation_are_ours(core):
    old, log_prob, advantages, mask, _ = verl_batch()
    names = {name for name, _ in parameters(core.agg_loss)}
    for name in names - {"loss_mat", "loss_mask", "loss_agg_mode"}:
        for mode in ours_verl.AGG_MODES:
            options = config(global_batch_info={name: 1})
            ours_verl.policy_loss("clip", old, log_prob, advantages, mask, mode, options)


def test_arguments_of_verls_log_probs_are_ours(core):
    functional = pytest.importorskip("verl.utils.torch_functional")
    theirs = parameters(functional.logprobs_from_logits)
    assert parameters(ours_verl.logprobs_from_logits) == theirs
