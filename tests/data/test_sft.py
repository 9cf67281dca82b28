"""Conversations to rows: every turn is learned once, as it was written, with the decision to stop;
whole samples in rows; what is left out is counted.
"""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import sft as experiments
from glm45_jax import values
from glm45_jax.data import sft
from glm45_jax.data.chats import ChatFile, MadeChats, Sample, document, samples_of
from glm45_jax.data.loader import Loader
from glm45_jax.data.prepare import Data
from glm45_jax.data.sft import Chats, Drop, Truncate, pack_samples, prepare, rows
from glm45_jax.data.sources import PydocTopics
from glm45_jax.metrics import read_jsonl
from glm45_jax.optim.mixed import AdamW
from glm45_jax.optim.schedules import Constant
from glm45_jax.tokenizer import train_bpe
from glm45_jax.train.parallel import Pmap

BYTES = train_bpe(["nothing"], 256 + 36)
USER, OBSERVATION, PAD = (BYTES.id_of(f"<|{t}|>") for t in ("user", "observation", "endoftext"))
FAMILIES = ("glm-4.5", "glm-4.7")


def said(role, content, reasoning=None):
    extra = {} if reasoning is None else {"reasoning_content": reasoning}
    return {"role": role, "content": content} | extra


def doc(messages, **options):
    return document(messages, source="test", id="one", **options)


def spans(sample):
    """What the model writes, run by run, as text."""
    edges = np.flatnonzero(np.diff(np.pad(sample.written_T.astype(int), 1)))
    return [BYTES.decode(sample.tokens_T[a:b]) for a, b in edges.reshape(-1, 2)]


def conversation(turns):
    """turns: (reasoning or None, whether a tool is called first), one a user message."""
    messages = []
    for n, (reasoning, calls) in enumerate(turns):
        messages.append(said("user", f"ask{n}"))
        if calls:
            call = {"name": f"tool{n}", "arguments": {"x": n}}
            messages.append(said("assistant", f"look{n}", reasoning) | {"tool_calls": [call]})
            messages.append(said("tool", f"found{n}"))
        messages.append(said("assistant", f"say{n}", reasoning))
    return messages


TURNS = st.lists(
    st.tuples(st.sampled_from([None, "hm <|user|> hm"]), st.booleans()), min_size=1, max_size=5
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=40)
@given(turns=TURNS)
def test_every_turn_is_learned_exactly_once_with_its_reasoning_and_its_stop(family, turns):
    samples = samples_of(doc(conversation(turns)), BYTES, family=family)
    learned = "|".join(text for one in samples for text in spans(one))
    for n, (_, calls) in enumerate(turns):
        assert learned.count(f"say{n}<|user|>") == 1
        assert learned.count(f"look{n}") == learned.count(f"<tool_call>tool{n}") == int(calls)
        assert f"ask{n}" not in learned and f"found{n}" not in learned
    thinks = sum(1 + calls for reasoning, calls in turns if reasoning)
    assert learned.count("hm <|user|> hm</think>") == thinks
    assert learned.count("<|observation|>") == sum(calls for _, calls in turns)
    assert len(samples) == (len(turns) if any(r for r, _ in turns[:-1]) else 1)
    for one in samples:
        assert one.tokens_T[-1] == USER and one.written_T[-1]
        assert one.thinking == any(r for r, _ in turns)


def test_the_mode_is_that_of_the_conversation_unless_it_says_otherwise():
    plain, thought = said("user", "hi"), said("assistant", "ho", "hm")
    (direct,) = samples_of(doc([plain, said("assistant", "ho")]), BYTES)
    assert "/nothink" in BYTES.decode(direct.tokens_T) and spans(direct) == ["\nho<|user|>"]
    (decides,) = samples_of(doc([plain, said("assistant", "ho")], thinking=True), BYTES)
    assert "/nothink" not in BYTES.decode(decides.tokens_T)
    assert spans(decides) == ["\n<think></think>\nho<|user|>"]
    (thinks,) = samples_of(doc([plain, thought]), BYTES)
    assert spans(thinks) == ["\n<think>hm</think>\nho<|user|>"]
    inside = said("assistant", "<think>hm</think>ho")
    assert spans(samples_of(doc([plain, inside]), BYTES)[0]) == spans(thinks)
    # Reasoning that direct mode could not have written teaches nothing.
    assert samples_of(doc([plain, thought], thinking=False), BYTES) == []
    (kept,) = samples_of(
        doc(conversation([("hm", False), ("hm", False)])),
        BYTES,
        family="glm-4.7",
        clear_thinking=False,
    )
    assert "".join(spans(kept)).count("hm</think>") == 2  # a mode that shows all: one sample


def test_a_share_of_thinking_conversations_is_read_in_direct_mode():
    docs = [
        document([said("user", "a"), said("assistant", "b", "hm")], source="s", id=str(n))
        for n in range(300)
    ]

    def direct_at(share):
        read = [samples_of(one, BYTES, direct=share)[0] for one in docs]
        assert all(("hm" in BYTES.decode(one.tokens_T)) == one.thinking for one in read)
        return {n for n, one in enumerate(read) if not one.thinking}

    third, half = direct_at(0.33), direct_at(0.5)
    assert third < half and 70 < len(third) < 130 and 120 < len(half) < 180
    assert len(direct_at(0.0)) == 0 and len(direct_at(1.0)) == 300
    inside = [said("user", "a"), said("assistant", "<think>hm</think>\nb")]
    (bare,) = samples_of(doc(inside), BYTES, direct=1.0)
    assert spans(bare) == ["\nb<|user|>"]


def some_samples(rng, lengths):
    return [
        Sample(
            rng.integers(1, 200, n).astype(np.int32), np.append(rng.random(n - 1) < 0.4, True), True
        )
        for n in lengths
    ]


def unpacked(row):
    """(tokens, written but for the first) of every segment of rows [R, T]."""
    for r in range(len(row["tokens"])):
        for segment in range(1, row["segments"][r].max() + 1):
            at = np.flatnonzero(row["segments"][r] == segment)
            assert (np.diff(at) == 1).all()
            np.testing.assert_array_equal(row["positions"][r, at], np.arange(len(at)))
            tokens, mask = row["tokens"][r, at], row["mask"][r, at]
            np.testing.assert_array_equal(row["targets"][r, at[:-1]], tokens[1:])
            assert mask[-1] == 0
            yield tuple(tokens.tolist()), tuple(mask[:-1] > 0)


@settings(max_examples=40)
@given(st.lists(st.integers(2, 20), min_size=1, max_size=20), st.integers(0, 99))
def test_samples_lie_whole_in_rows_with_the_mask_of_what_follows(lengths, seed):
    samples = some_samples(np.random.default_rng(seed), lengths)
    packed = pack_samples(samples, seq_len=20, pad_id=PAD)
    row = packed.take(range(len(packed)))
    expected = [(tuple(s.tokens_T.tolist()), tuple(s.written_T[1:])) for s in samples]
    assert sorted(unpacked(row)) == sorted(expected)
    padding = row["segments"] == 0
    assert (row["tokens"][padding] == PAD).all() and (row["mask"][padding] == 0).all()
    assert packed.counts["padding"] == padding.sum()
    assert packed.counts["tokens"] == sum(lengths)
    assert (
        packed.counts["written"] == row["mask"].sum() == sum(s.written_T[1:].sum() for s in samples)
    )
    for i in range(len(packed)):
        for name, array in packed[i].items():
            np.testing.assert_array_equal(array, row[name][i])


def test_long_samples_are_dropped_or_cut_and_counted():
    short, long = some_samples(np.random.default_rng(0), [5, 30])
    late = Sample(long.tokens_T, np.arange(30) >= 20, True)
    samples = [short, long, late]
    dropped = pack_samples(samples, seq_len=10, pad_id=PAD, long=Drop())
    assert len(dropped) == 1 and dropped.counts["dropped_long"] == 2
    cut = pack_samples(samples, seq_len=10, pad_id=PAD, long=Truncate())
    assert (cut.counts["truncated"], cut.counts["dropped_cut"], len(cut)) == (1, 1, 2)
    found = dict(unpacked(cut.take([0, 1])))
    assert found[tuple(long.tokens_T[:10].tolist())] == tuple(long.written_T[1:10])
    with pytest.raises(ValueError, match=r"none of 1 samples fits .* 10 tokens .* has 30"):
        pack_samples([long], seq_len=10, pad_id=PAD)
    with pytest.raises(IndexError, match=r"rows 2\.\.2 asked, there are 0\.\.1"):
        cut[2]


SUMS = MadeChats(experiments.Sums(), 60, name="sums")


def chats(**changes):
    base = Chats(sources=((SUMS, 1.0),), seq_len=96, vocab=BYTES.vocab, val_fraction=0.2)
    return dataclasses.replace(base, **changes)


def test_rows_of_the_store_are_those_of_the_samples_in_memory(tmp_path):
    data = chats()
    prepared = prepare(data, tmp_path)
    both = []
    for split in ("train", "val"):
        ((stored, weight),) = rows(data, prepared, split)
        assert weight == 1.0
        both += list(unpacked(stored.take(range(len(stored)))))
        counts = prepared.report["sources"]["sums"][split]
        assert counts["samples"] == stored.counts["samples"]
        assert counts["thinking"] > 0 and counts["direct"] > 0
    held = [one for doc in SUMS.docs() for one in samples_of(doc, prepared.tokenizer)]
    expected = {(tuple(one.tokens_T.tolist()), tuple(one.written_T[1:])) for one in held}
    assert sorted(both) == sorted(expected)
    assert prepared.report["dropped"]["sums"]["duplicates"] == len(held) - len(expected)


def test_what_is_prepared_is_opened_again_and_another_format_is_prepared_anew(tmp_path):
    first = prepare(chats(), tmp_path)
    (folder,) = tmp_path.iterdir()
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    again = prepare(chats(seq_len=40, long=Truncate()), tmp_path)
    assert again.fingerprint == first.fingerprint
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    for change in ({"direct": 0.5}, {"family": "glm-4.7"}, {"seed": 1}):
        assert sft.fingerprint_of(chats(**change)) != first.fingerprint
    written = folder / "train" / "sums.written.npy"
    np.save(written, np.load(written)[:-1])
    with pytest.raises(ValueError, match=r"sums\.written\.npy has .* bytes for"):
        rows(chats(), prepare(chats(), tmp_path))
    written.unlink()
    with pytest.raises(ValueError, match="is missing; delete its folder"):
        rows(chats(), prepare(chats(), tmp_path))


def test_the_loader_takes_the_rows_and_goes_on_where_it_stopped(tmp_path):
    data = chats()
    prepared = prepare(data, tmp_path)

    def loader():
        return Loader(
            rows(data, prepared),
            seed=3,
            span=lambda step: (4 * step, 4),
            fingerprint=prepared.fingerprint,
        )

    first, second = loader(), loader()
    second.check_state(first.state(5))
    batch = second.batch(5)
    np.testing.assert_array_equal(batch.tokens_BT, first.batch(5).tokens_BT)
    assert batch.tokens_BT.shape == (4, 96) and batch.mask_BT.sum() > 0
    seen = np.concatenate([first.batch(step).mask_BT.sum(axis=1) for step in range(5)])
    assert (seen > 0).all()


def write(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return ChatFile(str(path))


def test_a_file_of_lines_gives_its_conversations_and_keeps_groups_together(tmp_path):
    talk = [said("user", "a"), said("assistant", "b")]
    tool = {"type": "function", "function": {"name": "f"}}
    lines = [
        {"messages": [said("user", f"a{n}"), said("assistant", "b")], "group": f"g{n // 10}"}
        for n in range(40)
    ]
    source = write(tmp_path / "a.jsonl", *lines, "", {"messages": talk, "tools": [tool], "id": "x"})
    docs = list(source.docs())
    assert [d.id for d in docs[:2]] == ["a.jsonl:1", "a.jsonl:2"] and docs[-1].id == "x"
    (sample,) = samples_of(docs[-1], BYTES)
    assert "# Tools" in BYTES.decode(sample.tokens_T) and spans(sample) == ["\nb<|user|>"]
    assert list(ChatFile(str(tmp_path)).docs()) == docs
    prepared = prepare(chats(sources=((source, 1.0),)), tmp_path / "cache")
    splits = prepared.report["sources"]["chats"]
    sizes = {split: counts["conversations"] for split, counts in splits.items()}
    assert sum(sizes.values()) == 41 and sizes["val"] in (1, 10, 11, 20, 21)


@pytest.mark.parametrize(
    "line,message",
    [
        ("{", r"a\.jsonl:1 is not JSON"),
        ({"text": "x"}, 'has no list "messages"'),
        ({"messages": [], "wait": 1}, r"has \['wait'\]; known are messages, tools"),
        ({"messages": [], "thinking": "yes"}, "thinking is 'yes'; use true, false"),
        ({"messages": [{"role": "boss"}]}, r"a\.jsonl:1 of 'chats': message 0: role 'boss'"),
    ],
)
def test_a_line_that_is_no_conversation_is_refused_with_its_place(tmp_path, line, message):
    source = write(tmp_path / "a.jsonl", line)
    with pytest.raises(ValueError, match=message):
        for one in source.docs():
            samples_of(one, BYTES)


def test_values_that_make_no_sense_are_refused(tmp_path):
    for changes, message in (
        ({"direct": 1.5}, "direct 1.5 is not between"),
        ({"family": "glm-9"}, "family 'glm-9'"),
        ({"sources": ()}, r"source names are \[\]"),
        ({"packing": None}, "packed by BestFit"),
        ({"val_fraction": 0.0}, "val_fraction 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            chats(**changes)
    with pytest.raises(ValueError, match=r"the tokenizer has 292 ids, data\.vocab is 300"):
        prepare(chats(vocab=300), tmp_path, tokenizer=BYTES)
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        list(ChatFile(str(tmp_path / "nowhere")).docs())
    topics = dataclasses.replace(chats(), sources=((PydocTopics(), 1.0),), max_docs=4)
    with pytest.raises(ValueError, match=r"of 'topics' is text: it has no meta"):
        prepare(topics, tmp_path)


def test_text_and_conversations_go_through_one_door(tmp_path):
    text = Data(sources=((PydocTopics(), 1.0),), seq_len=16, vocab=BYTES.vocab, max_docs=4)
    for data in (text, chats()):
        prepared = sft.prepare_any(data, tmp_path)
        ((found, _),) = sft.rows_of_any(data, prepared, "val")
        assert found[0]["tokens"].shape == (data.seq_len,)
    assert BYTES.decode(sft.prompt_ids(text, BYTES, "1+1=")) == "1+1="
    asked = BYTES.decode(sft.prompt_ids(chats(), BYTES, "1+1="))
    assert asked == "[gMASK]<sop><|user|>\n1+1=<|assistant|>"


def test_the_tiny_run_learns_from_what_the_assistant_wrote(tmp_path):
    exp = values.override(experiments.tiny(), ["train.steps=12", "train.validate_every=0"])
    small = dataclasses.replace(exp.model, n_dense=0, n_moe=1, n_mtp=0)  # compiles in seconds
    optim = AdamW(lr=1e-2, schedule=Constant(1.0))
    exp = dataclasses.replace(exp, mesh=Pmap(1), model=small, optim=optim)
    assert exp.run(exp, tmp_path / "run").step == 12
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1].scalars["loss/ce"] < lines[0].scalars["loss/ce"] - 0.5
    assert "27+35=" in (tmp_path / "run" / "report.md").read_text()
