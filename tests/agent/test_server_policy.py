"""Rollouts by a server: what it samples, the adapter it serves, and what goes wrong with it."""

import json
import random
import socket
from dataclasses import asdict, replace

import pytest
import torch
from completions import CompletionsServer
from endpoint import hang, raw, status, torn
from runs import STEPS, metrics_of, rl_config, same, state_of

from regrpo.cli import main
from regrpo.config import EvalConfig, LoraSettings, RolloutConfig, TaskConfig, TrainConfig
from regrpo.errors import RunError
from regrpo.evaluate import run_eval
from regrpo.losses import packed_log_probs
from regrpo.modeling import head, hidden_states, load_model
from regrpo.packing import collate
from regrpo.prompts import opening
from regrpo.rl import run_rl
from regrpo.sampling import LocalPolicy
from regrpo.segments import TokenizedTrajectory
from regrpo.served_adapter import ServedLearner
from regrpo_kernels import Segment


@pytest.fixture
def server(base, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with CompletionsServer(str(base / "model")) as server:
        yield server


def settings(server, **fields):
    quick = {"backoff_s": 0.001, "retries": 2, "timeout_s": 30.0}
    where = {"backend": "server", "base_url": server.url, "model": "base"}
    return RolloutConfig(**{**where, **quick, **fields})


@pytest.fixture
def learner(base):
    torch.manual_seed(1)
    model = load_model(str(base / "model"), lora_rank=2).eval()
    move(model)
    return model


def move(model):
    """As an update does."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.fixture
def make(server, learner, tokenizer, tmp_path):
    def policy(*, temperature=1.0, limit=12, renewed=True, **fields):
        made = ServedLearner(
            settings(server, **fields),
            learner,
            tokenizer,
            tmp_path,
            temperature=temperature,
            max_new_tokens=limit,
        )
        if renewed:
            made.renew(7)
        return made

    return policy


def prompts_of(policy):
    questions = ("?", "What is in oak.csv?", "?")
    return [policy.chat.prompt(opening(q)) for q in questions for _ in range(2)]


def generate(policy, turns=1):
    """Samples of all turns; a tool says something else to each trajectory in between."""
    session, prompts, rng = policy.session(), prompts_of(policy), random.Random(0)
    found = []
    for _ in range(turns):
        samples = session.generate(prompts, range(len(prompts)))
        found.append(samples)
        seen = [policy.chat.observation(f"oak {rng.randrange(100)}") for _ in prompts]
        prompts = [[*p, *s.ids, *o] for p, s, o in zip(prompts, samples, seen, strict=True)]
    return found


def learned_log_probs(model, prompts, samples):
    rows = []
    for prompt, sample in zip(prompts, samples, strict=True):
        row = TokenizedTrajectory()
        row.extend(prompt, Segment.CONTEXT)
        row.extend(sample.ids, Segment.ACTION, sample.log_probs)
        rows.append(row)
    batch = collate(rows, with_old_log_probs=True)
    with torch.no_grad():
        now = packed_log_probs(hidden_states(model, batch), *head(model), batch, 1.0)
    return now[batch.loss_mask], batch.old_log_probs[batch.loss_mask]


def test_greedy_turns_are_those_of_the_model_here(make, learner, tokenizer):
    local = LocalPolicy(learner, tokenizer, temperature=0.0, max_new_tokens=12)
    ours, theirs = generate(make(temperature=0.0), turns=3), generate(local, turns=3)
    for samples, expected in zip(ours, theirs, strict=True):
        assert [s.ids for s in samples] == [s.ids for s in expected]
        for sample, other in zip(samples, expected, strict=True):
            assert sample.log_probs == pytest.approx(other.log_probs, abs=1e-4)


def test_the_server_serves_what_the_learner_is(make, learner, server):
    policy = make()
    for _ in range(3):
        (samples,) = generate(policy)
        now, then = learned_log_probs(learner, prompts_of(policy), samples)
        torch.testing.assert_close(now, then, rtol=0, atol=1e-4)
        move(learner)
        moved, _ = learned_log_probs(learner, prompts_of(policy), samples)
        assert (moved - then).abs().max() > 1e-2
        assert len(server.adapters) == 1  # the former one is unloaded
        policy.renew(8)
    names = [body["lora_name"] for path, body in server.calls if path == "/load_lora_adapter"]
    assert len(set(names)) == len(names) == 4
    policy.renew(9)  # the same weights: nothing to load
    assert sum(path == "/load_lora_adapter" for path, _ in server.calls) == 4


def test_the_samples_of_a_group_are_one_request(make, server):
    policy = make()
    (samples,) = generate(policy)
    bodies = [body for path, body in server.calls if path == "/completions"]
    assert [body["n"] for body in bodies] in ([4, 2], [2, 4])
    assert len({tuple(s.ids) for s in samples[:2] + samples[4:]}) > 1
    for body in bodies:
        assert body["stop_token_ids"] == [policy.chat.end_id]
        assert (body["max_tokens"], body["temperature"], body["logprobs"]) == (12, 1.0, 1)
    ends = {s.ids[-1] == policy.chat.end_id for s in samples} | {len(s.ids) < 12 for s in samples}
    assert True in ends


def test_samples_are_a_function_of_the_seed(make):
    policy = make()
    first = generate(policy, turns=2)
    assert generate(policy, turns=2) != first  # another session
    policy.renew(7)
    assert generate(policy, turns=2) == first
    policy.renew(8)
    assert generate(policy, turns=2) != first
    policy.renew(7)
    session, prompts = policy.session(), prompts_of(policy)
    shuffled = session.generate(prompts[::-1], range(len(prompts))[::-1])
    assert shuffled[::-1] == first[0]


def test_ids_may_come_as_text(make, server):
    policy = make()
    expected = generate(policy)

    def edit(answer):
        for choice in answer["choices"]:
            del choice["token_ids"], choice["prompt_token_ids"]
        return answer

    server.edit = edit
    policy.renew(7)
    assert generate(policy) == expected


@pytest.mark.parametrize(
    "fault",
    [status(500, "oops"), status(429, Retry_After="0"), torn, raw('{"choices": [{"ind'), raw("[]")],
    ids=["500", "429", "torn", "truncated", "list"],
)
def test_what_may_pass_is_repeated(make, server, fault):
    expected = generate(make())
    server.faults = [fault, fault]
    assert generate(make()) == expected


def dead():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


def changed(change):
    def edit(answer):
        for choice in answer["choices"]:
            change(choice)
        return answer

    return edit


def drop(*path):
    def change(choice):
        for key in path[:-1]:
            choice = choice[key]
        choice[path[-1]] = None

    return changed(change)


def without_ids(choice):
    choice["token_ids"] = None
    choice["logprobs"]["tokens"] = ["a"] * len(choice["logprobs"]["tokens"])


WRONG = {
    "no-log-probs": (drop("logprobs"), r"the answer has no log-probs \(choices\[\].logprobs"),
    "no-values": (drop("logprobs", "token_logprobs"), "the answer has no log-probs"),
    "no-ids": (changed(without_ids), r"the answer has no token ids \(choices\[\].token_ids"),
    "a-null": (
        changed(lambda c: c["logprobs"]["token_logprobs"].__setitem__(0, None)),
        r"the answer is no completion: .* \(3 attempts\)",
    ),
    "short": (
        changed(lambda c: c["logprobs"]["token_logprobs"].pop()),
        r"the answer is no completion: .* \(3 attempts\)",
    ),
    "few": (
        lambda answer: {"choices": answer["choices"][:1]},
        r"1 choices; expected \d \(3 attempts\)",
    ),
    "other-vocabulary": (
        changed(lambda c: c["token_ids"].__setitem__(0, 10**6)),
        "token id 1000000; the model's vocabulary has .* serves another model",
    ),
    "other-prompt": (
        changed(lambda c: c["prompt_token_ids"].insert(0, 1)),
        "the server changed the prompt's token ids",
    ),
    "no-stop-token": (
        changed(lambda c: (c["token_ids"].pop(), c["logprobs"]["token_logprobs"].pop())),
        "a turn of 11 tokens ends with .*; expected it to end with the first",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_answer_that_cannot_be_trained_on_ends_with_a_line(make, server, wrong):
    edit, message = WRONG[wrong]
    policy = make(retries=2)
    server.edit = edit
    with pytest.raises(RunError, match=rf"^rollout server {server.url}: {message}") as error:
        generate(policy)
    assert "the run goes on from its last checkpoint" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_server_that_is_not_there(make, server):
    url = dead()
    with pytest.raises(RunError, match=rf"^rollout server {url}: .*onnect.* \(3 attempts\); see"):
        make(base_url=url)
    policy = make()
    server.faults = [status(500, "no memory")] * 6
    with pytest.raises(RunError, match=r"status 500: no memory \(3 attempts\)"):
        generate(policy)
    server.faults = [hang(2.0)] * 6
    with pytest.raises(RunError, match=r"no whole answer within 0.2 s \(1 attempts\)"):
        generate(make(timeout_s=0.2, retries=0))


def test_what_it_does_not_serve(make, server):
    with pytest.raises(RunError, match=r"rollout.model is 'other'; the server has base; see"):
        make(model="other")
    policy = make()
    server.adapters.clear()  # it was started again
    with pytest.raises(RunError, match=r"status 404: .*The model `regrpo-\w+` does not exist"):
        generate(policy)
    policy.renew(7)
    generate(policy)
    server.runtime_loading = False
    server.adapters.clear()
    with pytest.raises(
        RunError, match=r"cannot load the adapter .*status 404: .*started with --en"
    ):
        policy.renew(7)


def test_the_key_is_sent_and_never_shown(make, server, monkeypatch):
    with pytest.raises(RunError, match=r"rollout.api_key_env: the environment variable VLLM_KEY"):
        make(api_key_env="VLLM_KEY")
    monkeypatch.setenv("VLLM_KEY", "sk-secret")
    policy = make(api_key_env="VLLM_KEY")
    assert server.headers[-1]["Authorization"] == "Bearer sk-secret"
    server.faults = [status(401, "bad key sk-secret")] * 3
    with pytest.raises(RunError, match=r"status 401: bad key \*\*\*"):
        generate(policy)


def test_full_weights_are_refused(base, server, environment, tmp_path):
    config = rl_config(base, tmp_path / "out", rollout=settings(server))
    with pytest.raises(RunError, match=r"can take a new adapter, not new weights; expected lora"):
        run_rl(config, environment)
    assert not (tmp_path / "out").exists()


def test_values_out_of_range():
    for fields, message in (
        ({"backend": "vllm"}, "rollout.backend: got 'vllm'; expected local or server"),
        ({"backend": "server", "base_url": "http://h/v1"}, "rollout.model: got None; expected a"),
        ({"base_url": "http://h/v1"}, "rollout.base_url: .* null without"),
        ({"backend": "server", "base_url": "h", "model": "m"}, "rollout.base_url: got 'h'"),
        ({"api_key_env": "sk-1"}, "rollout.api_key_env: expected the name of an environment"),
        ({"cache_gib": -1}, "rollout.cache_gib: got -1; expected 0 or more"),
        ({"concurrency": 0}, "rollout.concurrency: got 0; expected 1 or more"),
        ({"timeout_s": 0}, "rollout.timeout_s: got 0; expected a positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            RolloutConfig(**fields)
    server = RolloutConfig(backend="server", base_url="http://h/v1", model="m")
    with pytest.raises(ValueError, match=r"rollout.backend: .* local with mode offline"):
        TrainConfig(model="m", out="o", mode="offline", policy="reinforce", rollout=server)
    with pytest.raises(ValueError, match=r"temperature: got 0.7; expected 1 with rollout.backend"):
        TrainConfig(model="m", out="o", temperature=0.7, rollout=server)


def config_of(base, out, server, *, temperature=1.0, **fields):
    lora, rollout = LoraSettings(rank=2), settings(server, **fields)
    return rl_config(base, out, lora=lora, rollout=rollout, epochs=1, temperature=temperature)


def test_a_run_over_the_server_learns_from_its_own_adapter(base, server, environment, tmp_path):
    run_rl(config_of(base, tmp_path / "run", server), environment)
    metrics = metrics_of(tmp_path / "run")
    assert len(metrics) == STEPS
    assert all(line["log_probs/sampler"] < 1e-4 for line in metrics)
    assert all(line["grad_norm"] > 0 for line in metrics)
    loads = [body for path, body in server.calls if path == "/load_lora_adapter"]
    assert len(loads) == STEPS
    assert len(server.adapters) == 1
    assert len(list((tmp_path / "run" / "adapters").iterdir())) == 1
    here = rl_config(base, tmp_path / "here", lora=LoraSettings(rank=2), epochs=1)
    run_rl(here, environment)
    assert {*metrics[0]} == {*metrics_of(tmp_path / "here")[0]}


def test_at_another_temperature(base, server, environment, tmp_path):
    server.processed_log_probs = True
    config = config_of(base, tmp_path, server, temperature=0.7, processed_log_probs=True)
    run_rl(replace(config, steps=1), environment)
    assert metrics_of(tmp_path)[0]["log_probs/sampler"] < 1e-4


def test_a_run_whose_server_dies_goes_on_from_its_checkpoint(
    base, server, environment, tmp_path, capsys
):
    run_rl(config_of(base, tmp_path / "whole", server), environment)
    out = tmp_path / "out"

    def fall(answer):
        return {} if len(server.calls) > dies_at else answer

    dies_at = len(server.calls) + 14
    server.edit = fall
    arguments = ["train", "--config", str(tmp_path / "config.yaml")]
    config = config_of(base, out, server)
    (tmp_path / "config.yaml").write_text(json.dumps(plain(config)))
    with pytest.raises(SystemExit) as said:
        main(arguments)
    assert str(said.value).startswith(f"regrpo train: rollout server {server.url}: the answer is")
    assert str(said.value).endswith("the run goes on from its last checkpoint")
    reached = len(metrics_of(out))
    assert 2 <= reached < STEPS
    server.edit = lambda answer: answer
    server.adapters.clear()  # it was started again, at another address
    with CompletionsServer(str(base / "model")) as elsewhere:
        config = config_of(base, out, elsewhere)
        (tmp_path / "config.yaml").write_text(json.dumps(plain(config)))
        main(arguments)
        assert elsewhere.calls[0][0] == "/load_lora_adapter"
    assert metrics_of(out) == metrics_of(tmp_path / "whole")
    assert same(state_of(out), state_of(tmp_path / "whole"))


def test_evaluation_by_the_server_is_that_of_the_model(base, server, environment):
    def evaluation(**fields):
        tasks = TaskConfig(seed=9)
        config = EvalConfig(str(base / "model"), count=4, tasks=tasks, max_new_tokens=24, **fields)
        return run_eval(config, environment)

    assert evaluation(rollout=settings(server)) == evaluation()
    assert all(body["model"] == "base" for _, body in server.calls)
    server.edit = lambda answer: {}
    with pytest.raises(RunError, match=r"see to the server and give the same command again$"):
        evaluation(rollout=settings(server))


def plain(config):
    """Of a configuration, what YAML holds."""
    return json.loads(json.dumps(asdict(config)))
