"""Benchmarks with their images shown: to a model here, to an endpoint, and as training data."""

import base64

import pytest
from made_up import write_gaia, write_gta
from runs import metrics_of
from vision_models import image_processor, png, vision_model, with_markup

from regrpo.benchmarks.episodes import Episode, run_episodes
from regrpo.benchmarks.gta import read_gta
from regrpo.benchmarks.gta_dialogs import GtaEnvironment, opening, to_record, to_starts
from regrpo.benchmarks.models import PolicyChat, with_images
from regrpo.cli import main
from regrpo.config import OptimConfig, SFTConfig, SourceConfig
from regrpo.image_files import readable_image
from regrpo.modeling import load_image_reader, load_model, load_tokenizer
from regrpo.records import read_records
from regrpo.rollout import run
from regrpo.sampling import LocalPolicy
from regrpo.sft import run_sft
from regrpo.small_model import build_model, build_tokenizer, render_template
from regrpo.tool_calls import ToolCall, Turn
from regrpo.tools import Observation, Status
from regrpo.tools.gta.toolbox import Toolbox


@pytest.fixture
def data(tmp_path):
    return write_gta(tmp_path / "data")


@pytest.fixture
def model(data, tmp_path):
    """A folder with a tiny random vision-language model."""
    texts = [render_template(to_record(t)["conversations"]) for t in read_gta(data).tasks]
    tokenizer = with_markup(build_tokenizer(texts, ["Reflection:\n- ErrorType:", "Thought:"]))
    for part in (vision_model("qwen2-vl", tokenizer), tokenizer, image_processor()):
        part.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def policy_of(model):
    tokenizer = load_tokenizer(model)
    reader = load_image_reader(model, tokenizer)
    return LocalPolicy(load_model(model).eval(), tokenizer, max_new_tokens=4, reader=reader)


@pytest.mark.parametrize(("name", "write"), [("gta", write_gta), ("gaia", write_gaia)])
def test_a_vision_model_is_evaluated_with_images(model, tmp_path, name, write):
    folder = write(tmp_path / "more")
    command = ["eval", "--benchmark", name, "--data", str(folder), "--model", model]
    command += ["--max_new_tokens", "4", "--bench.max_steps", "2", "--out", str(tmp_path / "out")]
    main([*command, "--bench.images", "true"])
    assert (tmp_path / "out/report.json").exists()
    with pytest.raises(SystemExit, match="another run: images True"):
        main(command)


def test_a_text_model_with_images_is_told(data, tmp_path):
    texts = [render_template(to_record(t)["conversations"]) for t in read_gta(data).tasks]
    tokenizer = build_tokenizer(texts, ["Thought:"])
    for part in (build_model(tokenizer), tokenizer):
        part.save_pretrained(tmp_path / "text")
    command = ["eval", "--benchmark", "gta", "--data", str(data), "--bench.images", "true"]
    with pytest.raises(SystemExit, match="shows <image_00>, and a model that sees no images"):
        main([*command, "--model", str(tmp_path / "text"), "--out", str(tmp_path / "out")])


def test_pictures_that_tools_make_are_shown_in_the_next_turn(model):
    """The prompt of each turn holds every image so far."""
    files = [png(16, 16, seed=1), png(24, 16, seed=2)]
    policy = policy_of(model)
    prompts = []

    class Watching(PolicyChat):
        def replies(self, conversations, reflecting, images):
            super().replies(conversations, reflecting, images)
            prompts.append([list(shown) for shown in images])
            return [Turn(None, "Look.", ToolCall("look", ())).render() for _ in conversations]

    messages = [{"role": "user", "content": "Task: look\n<image_00>"}]
    seen = Observation("image/generated_1.png", Status.OK, files[1])
    episodes = [
        Episode("shown", list(messages), lambda call: seen, 2, images=files[:1]),
        Episode("not shown", [{"role": "user", "content": "Task: look"}], lambda call: seen, 2),
    ]
    ended = []
    run_episodes(Watching(policy), episodes, concurrency=2, reflect=True, on_end=ended.append)
    assert prompts == [[files[:1], []], [files, []]]
    assert episodes[0].messages[2]["content"].endswith("image/generated_1.png\n<image_01>")
    assert episodes[1].messages[2]["content"].endswith("image/generated_1.png")


def test_an_endpoint_is_sent_data_urls():
    data = png(16, 16)
    messages = [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": "Task: a\n<image_00>\nthen <image_07>"},
        {"role": "assistant", "content": "I see <image_00>."},
    ]
    system, user, said = with_images(messages, [data])
    assert (system, said) == (messages[0], messages[2])
    text, image, rest = user["content"]
    assert text == {"type": "text", "text": "Task: a\n"}
    head, encoded = image["image_url"]["url"].split(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(encoded) == data
    assert rest["text"] == "\nthen <image_07>"
    assert with_images(messages, ()) == messages


def test_the_dialogs_train_a_vision_model(data, model, tmp_path):
    command = ["data", "import", "--source", str(data / "dataset.json")]
    main([*command, "--out", str(tmp_path / "d")])
    plain = read_records(tmp_path / "d/dataset.jsonl")
    assert plain[0]["image"] == {"0": "image/shelf.png"}
    main([*command, "--images", "true", "--out", str(tmp_path / "shown")])
    records = read_records(tmp_path / "shown/dataset.jsonl")
    assert records[0]["image"] == {"<image_00>": "image/shelf.png"}
    assert records[0]["conversations"][1]["content"].endswith("\n<image_00>")
    source = SourceConfig(str(tmp_path / "shown/dataset.jsonl"), images=str(data))
    config = SFTConfig(
        model=model,
        out=str(tmp_path / "run"),
        data=[source],
        steps=2,
        max_length=4000,
        batch_tokens=4000,
        optim=OptimConfig(lr=1e-3),
    )
    run_sft(config)
    losses = [line["loss"] for line in metrics_of(tmp_path / "run")]
    assert losses[1] < losses[0]


def test_states_of_the_dialogs_are_rolled_out_with_images(data, model):
    tasks = read_gta(data)
    policy = policy_of(model)
    with Toolbox() as toolbox:
        environment = GtaEnvironment(tasks.tasks, toolbox, tasks.root)
        task = tasks.tasks[0]
        images = [readable_image(tasks.root / name) for name in task.files]
        starts = to_starts(task, images)
        assert starts[0].messages == tuple(opening(task, 1))
        ended = run(policy, environment, starts, reflect=True, whole=False)
    assert all(len(t.tokens.images) == 1 for t in ended)
    assert all(min(t.tokens.input_ids) < 0 for t in ended)
