"""Vision-language models: packed, shared and sampled against one sequence at a time."""

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from runs import metrics_of
from test_shared_context import in_double
from transformers import LlavaConfig
from vision_models import FAMILIES, image_processor, png, vision_model, with_markup

from regrpo.config import LoraSettings, OptimConfig, SFTConfig, SourceConfig, TrainConfig
from regrpo.copying import WORDS
from regrpo.image_files import placeholder, without_placeholders
from regrpo.images import image_rows, read_images, rotary_positions
from regrpo.learner import Learner
from regrpo.modeling import head, hidden_states, load_image_reader, load_model, load_tokenizer
from regrpo.packing import collate, pack_groups
from regrpo.prompts import observation_turn
from regrpo.record_images import record_images
from regrpo.records import write_records
from regrpo.rollout import conversation as conversation_behind
from regrpo.rollout import run
from regrpo.sampling import LocalPolicy
from regrpo.segments import ChatFormat, TokenizedTrajectory, tokenize_conversation
from regrpo.sft import run_sft
from regrpo.small_model import build_model
from regrpo.tasks import Step, Task
from regrpo.tool_calls import ToolCall
from regrpo.tools import Observation, Status
from regrpo.trajectory import Start
from regrpo_kernels import Segment

FILES = (png(16, 24, seed=1), png(24, 16, seed=2), png(16, 24, seed=3), png(40, 8, seed=4))


@pytest.fixture(scope="module")
def tokenizer_with_images(tokenizer):
    return with_markup(copy.deepcopy(tokenizer))


@pytest.fixture(scope="module")
def folders(tokenizer_with_images, tmp_path_factory):
    """Saved models by their family."""
    found = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        vision_model(family, tokenizer_with_images).save_pretrained(folder)
        tokenizer_with_images.save_pretrained(folder)
        image_processor().save_pretrained(folder)
        found[family] = str(folder)
    return found


@pytest.fixture(params=FAMILIES)
def loaded(request, folders):
    """Model in fp64, tokenizer and reader, as the trainer loads them."""
    folder = folders[request.param]
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, dtype=torch.float64).eval()
    return in_double(model), tokenizer, load_image_reader(folder, tokenizer)


@pytest.fixture
def reader(folders):
    tokenizer = load_tokenizer(folders["qwen2-vl"])
    return load_image_reader(folders["qwen2-vl"], tokenizer), tokenizer


def conversation(*turns):
    return [
        {"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns)
    ]


# Images in any turn, several in one, one twice, a literal name in what the model says.
CONVERSATIONS = [
    conversation("Task: read <image_00> and\n<image_01>", "Thought: oak <image_00>", "seen"),
    conversation("Task: read <image_00> and\n<image_02>", "Thought: oak", "saw <image_03> fig"),
    conversation("Task: no image", "Thought: fig"),
    conversation("Task: read <image_00> and\n<image_01>", "Thought: oak <image_00>", "<image_00>"),
]


def tokenized(tokenizer, reader):
    images = read_images(reader, FILES)
    return [
        tokenize_conversation(tokenizer, c, reader=reader, images=images) for c in CONVERSATIONS
    ]


def alone(model, trajectory):
    """Hidden states of one sequence as transformers computes them: its own attention and rope."""
    ids = torch.tensor(trajectory.input_ids)
    shown, _ = image_rows(ids.numpy(), trajectory.images)
    order = []
    for i, value in enumerate(trajectory.input_ids):
        if value < 0 and (i == 0 or trajectory.input_ids[i - 1] != value):
            order.append(trajectory.images[value])
    inputs = {}
    if order:
        inputs = {
            "pixel_values": torch.cat([image.pixel_values for image in order]),
            "image_grid_thw": torch.tensor([image.grid for image in order]),
            "mm_token_type_ids": (ids < 0).int()[None],
        }
    model.model.rope_deltas = None
    output = model.model(input_ids=torch.from_numpy(shown)[None], use_cache=False, **inputs)
    return output.last_hidden_state[0]


@pytest.mark.parametrize("share", [False, True])
def test_packed_hidden_states_are_those_of_each_alone(loaded, share):
    model, tokenizer, reader = loaded
    trajectories = tokenized(tokenizer, reader)
    batch = collate(trajectories, share=share)
    with torch.no_grad():
        hidden = hidden_states(model, batch)
        expected = torch.cat([alone(model, t) for t in trajectories])
    rows = batch.computed(torch.arange(len(batch.input_ids)))
    scale = expected.abs().max()
    assert (hidden[rows] - expected).abs().max() < 1e-9 * scale
    if share:
        assert len(batch.tree) < len(batch.input_ids)
        # The pixels of each image once, however many sequences show it.
        assert len(batch.images.grid_thw) == len(FILES)


def test_gradients_of_a_shared_batch_are_those_of_each_alone(loaded):
    model, tokenizer, reader = loaded
    trajectories = tokenized(tokenizer, reader)
    weights = torch.randn(sum(map(len, trajectories)), generator=torch.Generator().manual_seed(0))

    def gradients(hidden):
        loss = ((hidden @ head(model)[0].T).logsumexp(-1) * weights.double()).sum()
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.autograd.grad(loss, trained, allow_unused=True)

    batch = collate(trajectories, share=True)
    rows = batch.computed(torch.arange(len(batch.input_ids)))
    ours = gradients(hidden_states(model, batch)[rows])
    theirs = gradients(torch.cat([alone(model, t) for t in trajectories]))
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).abs().max() <= 1e-9 * b.abs().max().clamp(min=1e-6)


def test_an_image_token_that_was_sampled_is_text(loaded):
    """A policy can write the token that stands for pixels in the model's own input."""
    model, tokenizer, reader = loaded
    (first, *_) = tokenized(tokenizer, reader)
    pad = reader.token_id
    said = [
        TokenizedTrajectory([*first.input_ids, pad, 5], [0] * (len(first) + 2), [], first.images)
    ]
    said.append(TokenizedTrajectory([7, pad, 9], [0] * 3))
    with torch.no_grad():
        hidden = hidden_states(model, collate(said))
        expected = hidden_states(model, collate([first]))
    assert (hidden[: len(first)] - expected).abs().max() < 1e-9 * expected.abs().max()
    policy = LocalPolicy(model.float(), tokenizer, max_new_tokens=2, reader=reader)
    assert policy.session().generate([t.input_ids for t in said], range(2))


def test_only_the_language_side_is_trained(folders, tmp_path):
    for rank in (0, 4):
        model = load_model(folders["qwen2-vl"], lora_rank=rank)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained
        assert not [name for name in trained if "visual" in name]
    adapted = [name for name in trained if "lora" in name]
    assert adapted == trained
    assert all("self_attn" in name for name in adapted)
    model.save_pretrained(tmp_path / "adapter")
    again = load_model(str(tmp_path / "adapter"))
    assert [name for name, p in again.named_parameters() if p.requires_grad] == trained


def test_positions_are_those_of_transformers(loaded):
    model, tokenizer, reader = loaded
    for trajectory in tokenized(tokenizer, reader):
        ids = torch.tensor(trajectory.input_ids)
        order = [
            trajectory.images[value].grid
            for i, value in enumerate(trajectory.input_ids)
            if value < 0 and trajectory.input_ids[i - 1] != value
        ]
        expected, _ = model.model.get_rope_index(
            ids[None], (ids < 0).int()[None], torch.tensor(order) if order else None
        )
        found = rotary_positions(trajectory.input_ids, trajectory.images)
        assert found.tolist() == expected[:, 0].tolist()


def test_an_image_keeps_all_of_its_tokens_and_is_never_trained(reader):
    reader, tokenizer = reader
    images = read_images(reader, FILES)
    trajectory = tokenize_conversation(tokenizer, CONVERSATIONS[1], reader=reader, images=images)
    for name in ("<image_00>", "<image_02>", "<image_03>"):
        image = images[name]
        places = [i for i, value in enumerate(trajectory.input_ids) if value == image.key]
        assert len(places) == len(image) == image.grid[1] * image.grid[2] // 4
        kinds = {trajectory.segment_ids[i] for i in places}
        late = Segment.OBSERVATION if name == "<image_03>" else Segment.CONTEXT
        assert kinds == {int(late)}
    assert not collate([trajectory]).loss_mask[torch.tensor(trajectory.input_ids) < 0][1:].any()


def test_what_the_model_says_shows_nothing(reader):
    reader, tokenizer = reader
    images = read_images(reader, FILES)
    said = tokenize_conversation(tokenizer, CONVERSATIONS[0], reader=reader, images=images)
    assert len([v for v in said.input_ids if v < 0]) == len(images["<image_00>"]) + len(
        images["<image_01>"]
    )


def test_names_of_images_in_what_tools_say_are_text():
    assert "<image_00>" not in without_placeholders("a file that says <image_00>")
    assert without_placeholders("<b> image_00") == "<b> image_00"


def test_a_prompt_and_an_observation_are_as_in_the_whole_conversation(reader):
    reader, tokenizer = reader
    images = read_images(reader, FILES)
    chat = ChatFormat(tokenizer, reader)
    messages = [*CONVERSATIONS[0], {"role": "assistant", "content": "oak"}]
    whole = tokenize_conversation(tokenizer, messages, reader=reader, images=images).input_ids
    prompt = chat.prompt(messages[:1], images)
    turn = [*chat.encode(messages[1]["content"]), chat.end_id]
    observed = chat.observation(messages[2]["content"], images)
    assert (prompt + turn + observed) == whole[: len(prompt + turn + observed)]
    assert chat.prompt(messages[:3], images) == prompt + turn + observed


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
def test_sampled_log_probs_are_those_of_the_packed_model(loaded, cache_bytes):
    """Two turns with images before and between them; rows of a group, and others."""
    model, tokenizer, reader = loaded
    model.float()
    images = read_images(reader, FILES)
    policy = LocalPolicy(
        model, tokenizer, max_new_tokens=5, reader=reader, cache_gib=cache_bytes / 2**30
    )
    chat = policy.chat
    prompts = [
        chat.prompt(messages[:1], images) for messages in (*CONVERSATIONS[:3], CONVERSATIONS[0])
    ]
    session = policy.session()
    first = session.generate(prompts, range(4))
    seen = [chat.observation(text, images) for text in ("saw <image_03>", "oak", "<image_01> fig")]
    later = [p + s.ids + o for p, s, o in zip(prompts, first, [*seen, seen[0]], strict=True)]
    second = session.generate([later[i] for i in (0, 2, 3)], [0, 2, 3])
    for number, sample in zip((0, 2, 3), second, strict=True):
        rows = [[*later[number], *sample.ids]]
        batch = collate([_trajectory(rows[0], images)])
        with torch.no_grad():
            logits = hidden_states(model, batch) @ head(model)[0].T
        log_probs = logits.log_softmax(-1)
        for ids, values, begin in (
            (first[number].ids, first[number].log_probs, len(prompts[number])),
            (sample.ids, sample.log_probs, len(later[number])),
        ):
            for i, (token, value) in enumerate(zip(ids, values, strict=True)):
                assert log_probs[begin + i - 1, token].item() == pytest.approx(value, abs=1e-4)


def _trajectory(ids, images):
    by_key = {image.key: image for image in images.values()}
    return TokenizedTrajectory(list(ids), [0] * len(ids), [], by_key)


def test_reading(reader):
    reader, _ = reader
    image = reader.read(FILES[0], "a.png")
    assert reader.read(FILES[0], "b.png") is image
    assert reader.read(FILES[2], "c.png").key != image.key
    assert len(image.pixel_values) == image.grid[1] * image.grid[2]
    for data in (b"", b"no image", FILES[0][:40]):
        with pytest.raises(ValueError, match=r"broken\.png: .*expected an image that Pillow reads"):
            reader.read(data, "broken.png")


def test_images_and_a_model_that_sees_none():
    with pytest.raises(ValueError, match="shows <image_02>, and a model that sees no images"):
        read_images(None, FILES[:1], 2)
    assert read_images(None, ()) == {}


def test_a_text_model_has_no_reader(tmp_path, tokenizer):
    build_model(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_image_reader(str(tmp_path), tokenizer) is None


def test_a_vision_model_without_its_processor_is_said(folders, tmp_path, tokenizer_with_images):
    folder = tmp_path / "bare"
    load_model(folders["qwen2-vl"]).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"the image processor of .*bare cannot be loaded"):
        load_image_reader(str(folder), tokenizer_with_images)
    LlavaConfig().save_pretrained(folder)
    image_processor().save_pretrained(folder)
    with pytest.raises(ValueError, match="llava lacks one of vision_start_token_id"):
        load_image_reader(str(folder), tokenizer_with_images)


def test_placeholders_count_on():
    assert [placeholder(i) for i in (0, 9, 10, 123)] == [
        "<image_00>",
        "<image_09>",
        "<image_10>",
        "<image_123>",
    ]


# Training on records and trajectories with images.


def write_corpus(folder, count=6):
    """Records that show a page and, as an observation, a crop."""
    (folder / "images").mkdir()
    records = []
    for index in range(count):
        names = [f"images/{index}.png", f"images/{index}-crop.png"]
        for number, name in enumerate(names):
            (folder / name).write_bytes(png(16 + 8 * number, 16, seed=2 * index + number))
        turns = conversation(
            "Task: read <image_00>",
            "Thought: look.",
            observation_turn(0, "crop", 1),
            f"Thought: I know the answer.\n\nCode:\n```py\nfinal_answer('{WORDS[index]}')\n```",
        )
        image = {placeholder(number): name for number, name in enumerate(names)}
        records.append({"id": str(index), "image": image, "answer": "", "conversations": turns})
    write_records(folder / "records.jsonl", records)
    return records


@pytest.fixture
def corpus_with_images(tmp_path):
    return write_corpus(tmp_path)


def vision_sft(folder, tmp_path, **kwargs):
    defaults = {
        "model": folder,
        "out": str(tmp_path / "run"),
        "data": [SourceConfig(str(tmp_path / "records.jsonl"), mask="clean")],
        "steps": 4,
        "save_every": 2,
        "batch_tokens": 2000,
        "optim": OptimConfig(lr=1e-3),
    }
    return SFTConfig(**{**defaults, **kwargs})


@pytest.mark.parametrize("family", FAMILIES)
def test_sft_on_records_with_images(folders, family, tmp_path, corpus_with_images):
    config = vision_sft(folders[family], tmp_path, lora=LoraSettings(rank=4))
    out = run_sft(config)
    losses = [line["loss"] for line in metrics_of(tmp_path / "run")]
    assert losses[-1] < losses[0]
    tokenizer = load_tokenizer(out)
    reader = load_image_reader(out, tokenizer)  # the processor lies beside the adapter
    assert reader.processor.patch_size == 4
    assert len(reader.read(FILES[0], "a")) == len(
        load_image_reader(folders[family], tokenizer).read(FILES[0], "a")
    )
    # Without the images the very same text is less likely: what was learned looks at them.
    before = load_model(folders[family])
    assert not torch.equal(*(_mean_hidden(m, tokenizer, reader) for m in (before, load_model(out))))


def _mean_hidden(model, tokenizer, reader):
    batch = collate(tokenized(tokenizer, reader))
    with torch.no_grad():
        return hidden_states(model, batch).mean(0)


def test_the_vision_tower_stays_as_it_was(folders, tmp_path, corpus_with_images):
    out = run_sft(vision_sft(folders["qwen2-vl"], tmp_path, gradient_checkpointing=True))
    before, after = (load_model(f).state_dict() for f in (folders["qwen2-vl"], out))
    for name, value in before.items():
        assert torch.equal(value, after[name]) == ("visual" in name), name


def test_a_resumed_run_goes_on_bit_for_bit(folders, tmp_path, corpus_with_images):
    whole = vision_sft(folders["qwen2-vl"], tmp_path, out=str(tmp_path / "whole"))
    run_sft(whole)
    half = vision_sft(folders["qwen2-vl"], tmp_path, out=str(tmp_path / "half"))
    run_sft(half)
    for name in ("model", "checkpoints/00000004"):
        shutil.rmtree(tmp_path / "half" / name, ignore_errors=True)
    for path in (tmp_path / "half" / "checkpoints").iterdir():
        if "4" in path.name:
            shutil.rmtree(path)
    run_sft(half)
    assert metrics_of(tmp_path / "half") == metrics_of(tmp_path / "whole")


def test_images_that_are_missing_or_broken_are_named_and_the_rest_is_trained(
    folders, tmp_path, corpus_with_images, capsys
):
    (tmp_path / "images/1.png").unlink()
    (tmp_path / "images/2-crop.png").write_bytes(b"no image")
    run_sft(vision_sft(folders["qwen2-vl"], tmp_path, steps=1))
    told = capsys.readouterr().out
    assert "left out 1 records: image images/1.png: No such file or directory" in told
    assert "left out 1 records: image images/2-crop.png: " in told


def test_a_text_model_refuses_records_with_images(tmp_path, tokenizer, corpus_with_images):
    build_model(tokenizer).save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    config = vision_sft(str(tmp_path / "text"), tmp_path)
    with pytest.raises(ValueError, match="record '0' shows <image_00>, and the model sees no"):
        run_sft(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("image", ["page.png", ["page.png"], {"<image_00>": 3}])
def test_another_form_of_image_is_said(reader, tmp_path, image):
    record = {"id": "7", "image": image, "conversations": conversation("<image_00>", "fig")}
    with pytest.raises(ValueError, match=r"record '7': image is .*expected .\"<image_00>\": "):
        record_images(record, tmp_path, reader[0])


TASK = Task("t", "page", "", "", (), (Step(ToolCall("crop", ())),))


class Camera:
    """An environment whose every first call of a step gives a picture and a failure."""

    def __init__(self):
        self.given = []

    def execute(self, requests):
        self.given += requests
        status = Status.EMPTY if len(self.given) <= len(requests) else Status.OK
        return [
            Observation(f"crop {len(text)} <image_00>", status, png(24, 16, seed=len(text)))
            for _, text in requests
        ]


def test_trajectories_with_observed_images_are_learned_as_they_were_sampled(loaded):
    """The learner's log-probs of shared branches are the sampler's, images in both."""
    model, tokenizer, reader = loaded
    model.float()
    messages = conversation("Task: read <image_00> and <image_01>")
    starts = [
        Start(TASK, tuple(messages), expected="x", images=(page, FILES[1]))
        for page in (FILES[0], FILES[2])
    ]
    policy = LocalPolicy(model, tokenizer, max_new_tokens=6, reader=reader)
    trajectories = run(
        policy, Camera(), [s for s in starts for _ in range(3)], reflect=True, whole=False
    )
    assert all(len(t.turns) == 2 for t in trajectories)
    config = TrainConfig(model="", out="", steps=1, beta=0.0)
    learner = Learner(model, config)
    tokens = [t.tokens for t in trajectories]
    for rows in pack_groups([[0, 1, 2], [3, 4, 5]], tokens, 10_000):
        batch = collate([tokens[i] for i in rows], with_old_log_probs=True, share=True)
        assert len(batch.tree) < len(batch.input_ids)
        now = learner.log_probs(batch)[batch.loss_mask]
        assert (now - batch.old_log_probs[batch.loss_mask]).abs().max() < 1e-4
    # Read anew from messages and files, the conversation begins with the same tokens.
    sampled = trajectories[0]
    shown, images = conversation_behind(sampled.start, sampled.turns, sees=True)
    assert len(images) == 4
    again = ChatFormat(tokenizer, reader).prompt(shown, read_images(reader, images))
    count = sampled.tokens.segment_ids.index(int(Segment.ACTION))
    assert again[:count] == sampled.tokens.input_ids[:count]


def test_an_observed_image_is_for_models_that_see(environment, tokenizer):
    """A text model is shown the text of an observation, without a name for the image."""
    start = Start(TASK, tuple(conversation("Task: look")))
    policy = LocalPolicy(build_model(tokenizer), tokenizer, max_new_tokens=3)
    (trajectory,) = run(policy, Camera(), [start], reflect=False, whole=False)
    text = tokenizer.decode(trajectory.tokens.input_ids)
    assert "crop" in text
    assert "<image_" not in text


def test_two_sharded_processes_have_the_losses_of_one(folders, tmp_path, corpus_with_images):
    """Some passes of a process show images and the other's at the time show none."""
    with (tmp_path / "records.jsonl").open("a") as file:
        for index in range(3):
            turns = conversation("Task: no image", f"Thought: {WORDS[index]}")
            record = {"id": f"text {index}", "image": {}, "answer": "", "conversations": turns}
            file.write(json.dumps(record) + "\n")
    one = vision_sft(
        folders["qwen3-vl"], tmp_path, batch_tokens=120, max_length=120, out=str(tmp_path / "one")
    )
    run_sft(one)
    two = replace(one, out=str(tmp_path / "two"), parallel="fsdp")
    (tmp_path / "two.json").write_text(json.dumps(asdict(two)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "regrpo", "sft", "--config", str(tmp_path / "two.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for line, other in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two"), strict=True):
        assert other == pytest.approx(line, rel=1e-4)
