"""What supervised fine-tuning reads, and in which order."""

from regrpo.config import SourceConfig
from regrpo.records import write_records
from regrpo.sft import batches, load_trajectories


def test_load_trajectories_counts_what_it_leaves_out(tokenizer, corpus, tmp_path):
    write_records(tmp_path / "mixed.jsonl", [*corpus.rot[:5], *corpus.success[:3]])
    rot = SourceConfig(str(tmp_path / "mixed.jsonl"), mask="rot")
    trajectories, skipped = load_trajectories(tokenizer, [rot], 10_000)
    assert (len(trajectories), dict(skipped)) == (5, {"no turn to train under mask 'rot'": 3})
    limit = sorted(map(len, trajectories))[2]
    trajectories, skipped = load_trajectories(tokenizer, [rot], limit)
    assert all(len(t) <= limit for t in trajectories)
    assert skipped[f"longer than max_length={limit}"] == 5 - len(trajectories)
    stripped = SourceConfig(str(tmp_path / "mixed.jsonl"), mask="repair", reflections="strip")
    trajectories, _ = load_trajectories(tokenizer, [stripped], 10_000)
    assert len(trajectories) == 8
    assert not any("Reflection:\n" in tokenizer.decode(t.input_ids) for t in trajectories)


def test_batches_take_every_sequence_once_an_epoch():
    lengths = [7, 3, 9, 1, 5, 5, 8, 2]
    order = batches(lengths, 10, seed=0)
    epochs = []
    for _ in range(3):
        seen, packs = [], []
        while len(seen) < len(lengths):
            pack = next(order)
            assert sum(lengths[i] for i in pack) <= 10
            seen += pack
            packs.append(pack)
        assert sorted(seen) == list(range(len(lengths)))
        epochs.append(packs)
    assert epochs[0] != epochs[1]
    again = batches(lengths, 10, seed=0)
    assert [next(again) for _ in epochs[0]] == epochs[0]
