"""Laws of the tokenizer, on one trained from the interpreter's own source files."""

import argparse
import ast
import concurrent.futures
import inspect
import json
import pickle
import subprocess
import sys
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45_jax.tokenizer import (
    END_OF_TEXT,
    RELEASES,
    SHORT,
    SPECIAL_TOKENS,
    STOP_TOKENS,
    Release,
    Tokenizer,
    train_bpe,
)

VOCAB = 700
BASE = VOCAB - len(SPECIAL_TOKENS)


def corpus() -> list[str]:
    return [inspect.getsource(module) for module in (argparse, ast, inspect, typing)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(corpus(), VOCAB)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=("Cs",))))
def test_every_text_survives_encoding_and_decoding(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < BASE for i in ids)


def test_the_glm_tokens_take_the_last_ids_in_the_order_of_the_release(tokenizer):
    ids = [tokenizer.id_of(token.text) for token in SPECIAL_TOKENS]
    assert tokenizer.vocab == VOCAB
    assert ids == list(range(BASE, VOCAB))
    # Offsets from the release: <|endoftext|> is 151329, <think> 151350, /nothink 151360.
    assert tokenizer.id_of("<think>") - tokenizer.id_of(END_OF_TEXT) == 151350 - 151329
    assert tokenizer.id_of("/nothink") - tokenizer.id_of(END_OF_TEXT) == 151360 - 151329
    assert tokenizer.id_of("<|video|>") - tokenizer.id_of(END_OF_TEXT) == 151364 - 151329
    assert sum(token.special for token in SPECIAL_TOKENS) == (151349 - 151329 + 1) + 1


@pytest.mark.parametrize("token", [token.text for token in SPECIAL_TOKENS])
def test_a_glm_token_in_a_document_is_text_unless_we_wrote_it(tokenizer, token):
    text = f"see {token} here"
    assert all(i < BASE for i in tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    trusted = tokenizer.encode(text, allow_special=True)
    assert [i for i in trusted if i >= BASE] == [tokenizer.id_of(token)]
    assert tokenizer.decode(trusted) == text


def test_skipping_special_tokens_keeps_the_reasoning_and_tool_tags(tokenizer):
    text = "<|assistant|><think>why</think>/nothink<tool_call>f</tool_call><|endoftext|>"
    ids = tokenizer.encode(text, allow_special=True)
    kept = "<think>why</think><tool_call>f</tool_call>"
    assert tokenizer.decode(ids, skip_special=True) == kept


@pytest.mark.parametrize("allow_special", [False, True])
def test_a_batch_is_encoded_as_its_texts_are_one_by_one(tokenizer, allow_special):
    texts = ["", "def f(x):\n    return x\n", "a<think>b</think>", "12345 Ünï 日本", *corpus()]
    batch = tokenizer.encode_batch(texts, allow_special=allow_special)
    assert batch == [tokenizer.encode(text, allow_special=allow_special) for text in texts]


def test_ids_that_are_remembered_are_the_callers_own_and_of_one_reading(tokenizer):
    text = "a <think>b</think>"
    plain, trusted = tokenizer.encode(text), tokenizer.encode(text, allow_special=True)
    assert plain != trusted
    tokenizer.encode(text).clear()
    assert tokenizer.encode(text) == plain
    assert tokenizer.encode(text, allow_special=True) == trusted
    long = text * SHORT
    assert [tokenizer.encode(long)] * 2 == [tokenizer.encode(long), *tokenizer.encode_batch([long])]


def test_a_tokenizer_may_be_shared_by_threads_and_sent_to_a_process(tokenizer):
    texts = [f"text {n % 1500}" for n in range(6000)]
    ids = tokenizer.encode_batch(texts)
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert list(threads.map(tokenizer.encode, texts)) == ids
    sent = pickle.loads(pickle.dumps(tokenizer))
    assert [sent.encode(text) for text in texts[:20]] == ids[:20]
    assert sent.fingerprint == tokenizer.fingerprint


def test_no_token_joins_more_than_three_digits():
    digits = "1234567890" * 3000
    trained = train_bpe([digits, *corpus()], VOCAB)
    lengths = [len(trained.decode([i])) for i in trained.encode(digits)]
    assert max(lengths) == 3


def test_contractions_split_off_in_any_case():
    trained = train_bpe(["don't DON'T " * 3000, *corpus()], VOCAB)
    for word in ("don't", "DON'T"):
        pieces = [trained.decode([i]) for i in trained.encode(word)]
        assert pieces[-1].lower() == "'t"


def test_training_is_the_same_in_every_process(tokenizer):
    script = (
        "import sys; sys.path[:0] = ['.', 'tests']\n"
        "from test_tokenizer import corpus, VOCAB, train_bpe\n"
        "print(train_bpe(corpus(), VOCAB).fingerprint)"
    )
    other = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == tokenizer.fingerprint
    assert train_bpe(corpus()[:3], VOCAB).fingerprint != tokenizer.fingerprint


def test_glm_tokens_in_the_training_text_do_not_move_the_ids():
    noisy = [f"{text} /nothink" * 20 for text in ("a b", "c d")]
    trained = train_bpe([*noisy, *corpus()], VOCAB)
    assert [trained.id_of(token.text) for token in SPECIAL_TOKENS] == list(range(BASE, VOCAB))


def test_loading_what_was_saved_gives_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = Tokenizer.load(tmp_path / "new" / "folder" / "tokenizer.json")
    assert loaded.fingerprint == tokenizer.fingerprint
    text = corpus()[0]
    assert loaded.encode(text) == tokenizer.encode(text)


def test_a_fingerprint_does_not_depend_on_the_layout_of_the_file(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    assert Tokenizer(json.dumps(spec, indent=2)).fingerprint == tokenizer.fingerprint


def test_a_damaged_or_foreign_file_is_named_with_what_is_wrong(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer at .*tokenizer\.json; train one"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"tokenizer\.json.*not JSON.*cut short"):
        Tokenizer.load(tmp_path)
    file.write_text(json.dumps(json.loads(whole) | {"model": {"type": "Unigram"}}))
    with pytest.raises(ValueError, match="model type 'Unigram', expected 'BPE'"):
        Tokenizer.load(tmp_path)


def test_an_id_or_token_that_does_not_exist_is_refused(tokenizer):
    with pytest.raises(ValueError, match=f"id {VOCAB} is outside the tokenizer's {VOCAB} ids"):
        tokenizer.decode([0, VOCAB])
    with pytest.raises(ValueError, match=r"'<\|nobody\|>' is not among"):
        tokenizer.id_of("<|nobody|>")


def test_a_vocabulary_that_the_text_cannot_fill_is_refused():
    with pytest.raises(ValueError, match="vocab 291 is below 292"):
        train_bpe(corpus(), 291)
    with pytest.raises(ValueError, match="base tokens of the 964 that vocab 1000 needs"):
        train_bpe(["only a few words"], 1000)
    assert train_bpe(["nothing to merge"], 292).vocab == 292


def released_json(small: Tokenizer, folder, release: Release) -> str:
    """A tokenizer.json of released form and size: `small` padded with words that no text has."""
    small.save(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    vocab = {word: at for word, at in spec["model"]["vocab"].items() if at < BASE}
    filler = range(len(vocab), release.first)
    spec["model"]["vocab"] = vocab | {f"\u0100filler{at}": at for at in filler}
    shared = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec["added_tokens"] = [
        {"id": release.first + at, "content": token.text, "special": token.special} | shared
        for at, token in enumerate(release.tokens)
    ]
    return json.dumps(spec)


@pytest.fixture(scope="module", params=RELEASES, ids=lambda release: release.name)
def release(request) -> Release:
    return request.param


@pytest.fixture(scope="module")
def released(tokenizer, release, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("released")
    (folder / "tokenizer.json").write_text(released_json(tokenizer, folder, release))
    said = {
        str(release.first + at): {"content": token.text, "special": token.special}
        for at, token in enumerate(release.tokens)
    }
    config = {"added_tokens_decoder": said, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(folder)


def test_a_file_of_released_form_reads_every_token_at_its_released_id(released, release):
    ids = [released.id_of(token.text) for token in release.tokens]
    assert ids == list(range(release.first, release.first + 36))
    assert released.vocab == release.first + 36
    assert released.stop_ids == (release.first, release.first + 7, release.first + 9)
    text = "def f(x):\n    return [x, '日本', 12345]  # <think> /nothink\r\n"
    assert released.decode(released.encode(text)) == text
    assert max(released.encode(text)) < release.first


def test_released_ids_are_those_of_the_published_tables():
    glm45, flash = RELEASES
    at = [token.text for token in SPECIAL_TOKENS].index
    assert [glm45.first + at(token) for token in STOP_TOKENS] == [151329, 151336, 151338]
    assert [flash.first + at(token) for token in STOP_TOKENS] == [154820, 154827, 154829]
    assert glm45.first + at("<tool_call>") == 151352
    assert sum(token.special for token in flash.tokens) == 18


def test_skipping_special_tokens_keeps_the_tags_of_either_family(released, release):
    text = "<|assistant|><think>why</think><tool_call>f<arg_key>a</arg_key></tool_call><|user|>"
    ids = released.encode(text, allow_special=True)
    kept = text.removeprefix("<|assistant|>").removesuffix("<|user|>")
    assert released.decode(ids, skip_special=True) == kept
    # The code tokens and /nothink are special in 4.5 alone.
    ids = released.encode("a<|code_prefix|>/nothink", allow_special=True)
    flash = release.name == "GLM-4.7-Flash"
    assert released.decode(ids, skip_special=True) == ("a<|code_prefix|>/nothink" if flash else "a")


def test_a_tokenizer_fits_the_model_of_its_own_release_only(released, release):
    stops = list(released.stop_ids)
    released.check_model(rows=release.rows, eos=stops, pad=stops[0])
    released.check_model(rows=release.rows, eos=stops[0])
    other = next(r for r in RELEASES if r != release)
    with pytest.raises(ValueError, match=rf"{release.name}.*{other.rows} rows.* one release"):
        released.check_model(rows=other.rows)
    with pytest.raises(ValueError, match=rf"eos_token_id is \[{stops[0]}, 5\]"):
        released.check_model(rows=release.rows, eos=[stops[0], 5])
    with pytest.raises(ValueError, match=r"eos_token_id is \[1, 2\].*pad_token_id is \[0\]"):
        released.check_model(rows=release.rows, eos=[1, 2], pad=0)


def test_a_small_tokenizer_fits_a_small_model_and_not_a_released_one(tokenizer):
    tokenizer.check_model(rows=VOCAB + 68, eos=tokenizer.stop_ids, pad=BASE)
    with pytest.raises(ValueError, match=f"the tokenizer has {VOCAB} ids .*, the model 256 rows"):
        tokenizer.check_model(rows=256)
    with pytest.raises(ValueError, match=rf"<\|endoftext\|> is id {BASE} .* it is 151329"):
        tokenizer.check_model(rows=151_552)


def test_tokens_that_are_missing_moved_or_wrongly_special_are_named(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    added = spec["added_tokens"]
    lacking = spec | {"added_tokens": added[:-1]}
    with pytest.raises(ValueError, match=r"lacks <\|video\|>"):
        Tokenizer(json.dumps(lacking)).check_model(rows=VOCAB)
    texts = [token["content"] for token in added]
    texts[7], texts[8] = texts[8], texts[7]
    moved = [token | {"content": text} for token, text in zip(added, texts, strict=True)]
    with pytest.raises(ValueError, match=rf"<\|user\|> is id {BASE + 8} .* it is {BASE + 7}"):
        Tokenizer(json.dumps(spec | {"added_tokens": moved})).check_model(rows=VOCAB)
    special = [token | {"special": True} for token in added]
    with pytest.raises(ValueError, match=r"<think>, </think>, .* are special"):
        Tokenizer(json.dumps(spec | {"added_tokens": special})).check_model(rows=VOCAB)


def test_a_tokenizer_config_of_another_release_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"added_tokens_decoder": {"151336": {"content": "<|user|>"}}}))
    with pytest.raises(ValueError, match=rf"'<\|user\|>' id 151336, tokenizer.json {BASE + 7}"):
        Tokenizer.load(tmp_path)
    config.write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(ValueError, match="'</s>' is not among"):
        Tokenizer.load(tmp_path)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer.load(tmp_path)


def test_a_glm_token_listed_in_the_base_vocabulary_too_stays_out_of_plain_text(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["model"]["vocab"] |= {token["content"]: token["id"] for token in spec["added_tokens"]}
    both = Tokenizer(json.dumps(spec))
    assert both.id_of("/nothink") in both.encode("/nothink", allow_special=True)
    assert max(both.encode("/nothink")) < BASE
