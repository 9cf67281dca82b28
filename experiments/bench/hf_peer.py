"""Does transformers read a folder that `hf.save` wrote, and compute the same? For a machine that
has transformers and torch; needs neither grain nor tokenizers.
"""

import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.results import device_name, merge_result
from glm45_jax import hf
from glm45_jax import params as params_lib
from glm45_jax.model import config, transformer

ROWS, TOKENS = 2, 33


def main() -> None:
    """Writes `tiny` with random weights, lets transformers load it, compares logits."""
    import torch
    import transformers

    cfg = config.tiny()
    params = params_lib.init(transformer.specs(cfg), jax.random.key(0))
    params = jax.tree.map(lambda w: w * 4 if w.ndim > 2 else w, params)  # logits that differ
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(0, cfg.vocab, (ROWS, TOKENS)).astype(np.int32)
    with jax.default_matmul_precision("highest"):
        hidden = transformer.forward(params, jnp.asarray(tokens_BT), cfg=cfg)
        ours_BTV = np.asarray(transformer.logits(params, hidden, cfg=cfg))
    with tempfile.TemporaryDirectory() as folder:
        hf.save(folder, cfg, params)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            theirs_BTV = model(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()
    value = {
        "command": "python -m experiments.bench.hf_peer",
        "transformers": transformers.__version__,
        "model": type(model).__name__,
        "largest_logit": round(float(np.abs(theirs_BTV).max()), 3),
        "largest_difference": float(np.abs(ours_BTV - theirs_BTV).max()),
    }
    print(value)
    print(f"wrote {merge_result(device_name(), 'hf_peer', value)}")


if __name__ == "__main__":
    main()
