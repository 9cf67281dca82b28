"""Laws of seqio providers: tokens are those of `prepare`, rows and rates those of the loader."""

import dataclasses
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

if sys.version_info >= (3, 13):
    pytest.skip("seqio's packages have no wheels for this Python", allow_module_level=True)

from glm45_jax.data import tasks
from glm45_jax.data.fim import WithFim
from glm45_jax.data.pack import BestFit, Cut
from glm45_jax.data.prepare import Data, prepare, rows
from glm45_jax.data.quality import EPOCHS
from glm45_jax.data.sources import Doc, PydocTopics
from glm45_jax.data.store import open_store
from glm45_jax.tokenizer import END_OF_TEXT
from glm45_jax.train.stages import Stage

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Topics:
    """Pages of the language reference, some of which are read more than once; one holds a tag."""

    name: str
    letters: str

    def docs(self):
        for doc in PydocTopics().docs():
            if doc.id.split("/")[1][0].lower() in self.letters:
                meta = {**doc.meta, EPOCHS: "2.5"} if len(doc.id) % 3 == 0 else doc.meta
                text = doc.text[:3000] + ("\n<|endoftext|> \0 é\n" if len(doc.id) % 5 == 0 else "")
                yield Doc(doc.id, text, self.name, meta)

    def version(self):
        return PydocTopics().version()


DATA = Data(
    ((Topics("topics a-m", "abcdefghijklm"), 3.0), (WithFim(Topics("code/n-z", "nopqrst")), 1.0)),
    seq_len=64,
    vocab=600,
    val_fraction=0.2,
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(DATA, tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def of_documents(prepared):
    return tasks.document_tasks(DATA, prepared.tokenizer, metric_fns=[tasks.exact_match])


def test_materialised_tasks_are_the_stores_that_prepare_writes(prepared, of_documents, tmp_path):
    found = tasks.materialise(of_documents, tmp_path, prepared.tokenizer)
    stores = {("train", n): s for n, s in prepared.train.items()}
    stores |= {("val", n): s for n, s in prepared.val.items()}
    assert found.keys() == stores.keys()
    for key, store in stores.items():
        assert found[key].fingerprint == store.manifest.fingerprint, key
        assert found[key].n_docs == store.manifest.n_docs > 1
    assert any(doc.n_tokens for doc in found.values())
    opened = open_store(
        tmp_path / "train" / "topics a-m",
        vocab=600,
        tokenizer_fingerprint=prepared.tokenizer.fingerprint,
        verify=True,
    )
    assert len(Cut().rows(opened, 64, 0)) > 10
    with pytest.raises(ValueError, match="exists; a store is written once"):
        tasks.materialise(of_documents, tmp_path, prepared.tokenizer)


def test_a_task_over_other_tokens_is_refused(prepared, of_documents, tmp_path):
    other = prepare(dataclasses.replace(DATA, vocab=400), tmp_path / "other").tokenizer
    with pytest.raises(ValueError, match=r"over GlmVocabulary\(600.*not over GlmVocabulary\(400"):
        tasks.materialise(of_documents, tmp_path / "m", other)
    with pytest.raises(ValueError, match=r"tokenizer has 400 ids, data\.vocab is 600"):
        tasks.document_tasks(DATA, other)


def test_the_vocabulary_is_the_tokenizer_in_python_and_in_a_graph(prepared):
    import tensorflow as tf

    made = tasks.vocabulary(prepared.tokenizer)
    again = tasks.vocabulary(
        type(prepared.tokenizer).load(prepared.train["topics a-m"].path.parents[1])
    )
    assert made == again and hash(made) == hash(again) and made != object()
    text = "def f(x): # <|endoftext|> é\n    return x"
    ids = prepared.tokenizer.encode(text)
    end = prepared.tokenizer.id_of(END_OF_TEXT)
    assert made.encode(text) == ids and (made.eos_id, made.pad_id, made.vocab_size) == (
        end,
        end,
        600,
    )
    assert made.encode_tf(tf.constant(text)).numpy().tolist() == ids
    assert made.decode([*ids, end, 5, 6]) == text
    assert made.decode_tf(tf.constant([*ids, end, 5])).numpy().decode() == text
    both = made.decode_tf(tf.constant([[*ids, end, 5], [end] * (len(ids) + 2)])).numpy().tolist()
    assert [one.decode() for one in both] == [text, ""]


@pytest.mark.parametrize("packing", [Cut(), BestFit()])
def test_rows_of_a_task_are_those_that_the_loader_draws_from(prepared, packing):
    plan = dataclasses.replace(tasks.whole(DATA), packing=packing, seq_len=48)
    data = dataclasses.replace(DATA, packing=packing, seq_len=48)
    made = tasks.row_tasks(data, prepared, plan)
    for split in ("train", "val"):
        for (source, _), (name, _) in zip(rows(data, prepared, split), plan.mixture, strict=True):
            given = made[name].get_dataset(split=split, shuffle=False).as_numpy_iterator()
            wanted = [source[i] for i in range(len(source))]
            for row, want in zip(given, wanted, strict=True):
                assert row.keys() == want.keys()
                for key in want:
                    np.testing.assert_array_equal(row[key], want[key])
                    assert row[key].dtype == want[key].dtype


def test_a_stage_mixes_its_sources_at_their_rates(prepared):
    plan = tasks.whole(DATA, "stage 1")
    mixture = tasks.stage_mixture(DATA, prepared, plan)
    made = tasks.row_tasks(DATA, prepared, plan)
    rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    assert rates == {made["topics a-m"].name: 3.0, made["code/n-z"].name: 1.0}
    of = {}
    for name, task in made.items():
        for row in task.get_dataset(split="train", shuffle=False).as_numpy_iterator():
            of[row["tokens"].tobytes()] = name
    drawn = mixture.get_dataset(split="train", seed=7).as_numpy_iterator()
    seen = Counter(of[next(drawn)["tokens"].tobytes()] for _ in range(800))
    assert seen["topics a-m"] / 800 == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / 800))
    with pytest.raises(ValueError, match=r"stage s mixes \['nothing'\]"):
        tasks.stage_mixture(
            DATA, prepared, dataclasses.replace(plan, name="s", mixture=(("nothing", 1.0),))
        )


def test_names_tell_the_data_and_only_register_touches_the_registries(prepared, of_documents):
    seqio = tasks.seqio()
    registries = (seqio.TaskRegistry, seqio.MixtureRegistry)
    before = [set(registry.names()) for registry in registries]
    one = tasks.stage_mixture(DATA, prepared, tasks.whole(DATA))
    shares = tuple((source.name, share) for source, share in DATA.sources)
    stage = Stage("all", 1e6, 32, shares, Cut(), 1e4, 1e-3, 0.3, 64)
    other = tasks.stage_mixture(DATA, prepared, stage)
    documents = list(of_documents.values())
    changed = tasks.document_tasks(dataclasses.replace(DATA, seed=1), prepared.tokenizer)
    names = {p.name for p in [one, other, *one.tasks, *other.tasks, *documents, *changed.values()]}
    assert len(names) == 10 and {"glm45.all.stage"} == {
        name.rpartition(".")[0] for name in names if ".stage." in name
    }
    assert [set(registry.names()) for registry in registries] == before
    try:
        tasks.register(one, other, *documents)
        tasks.register(one)
        assert seqio.get_mixture_or_task(one.name) is one
        assert all(seqio.TaskRegistry.get(task.name) is task for task in [*one.tasks, *documents])
        assert tasks.provider_name("a b", "0" * 64) == "glm45.a#20b.0000000000000000"
    finally:
        for provider in [one, other, *one.tasks, *other.tasks, *documents]:
            for registry in registries:
                registry.remove(provider.name)


def test_metrics_are_seqios_as_they_are_and_ours_to_it(of_documents):
    seqio = tasks.seqio()
    targets, said = ["The cat", "4", ""], ["a cat sat", " 4\n", ""]

    def wrapped(targets, predictions):
        return {"right": seqio.metrics.Scalar(sum(map(str.__eq__, targets, predictions)))}

    task = of_documents["topics a-m"]
    assert task.metric_fns == [tasks.exact_match] == task.predict_metric_fns
    fns = [*task.metric_fns, tasks.token_f1, wrapped, tasks.log_likelihood,
           tasks.mean_of("shorter", lambda target, given: len(given) < len(target))]  # fmt: skip
    given = {"predictions": said, "scores": [-1.0, -2.0, -6.0]}
    assert tasks.metric_values(fns, targets, **given) == pytest.approx(
        {"exact_match": 2 / 3, "token_f1": (2 / 3 + 2) / 3, "right": 1, "log_likelihood": -3,
         "shorter": 0}
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"log_likelihood needs \['scores'\]"):
        tasks.metric_values(fns, targets, predictions=said)
    with pytest.raises(ValueError, match="two metrics are called exact_match"):
        tasks.metric_values([tasks.exact_match] * 2, targets, predictions=said)
    with pytest.raises(ValueError, match="1 outputs for 3 targets"):
        tasks.exact_match(targets, ["x"])


def test_importing_the_file_and_its_metrics_brings_no_tensorflow():
    code = (
        "import sys; from glm45_jax.data import tasks;"
        "tasks.metric_values([tasks.exact_match], ['a'], predictions=['a']);"
        "print([m for m in ('tensorflow', 'seqio', 'jax') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
