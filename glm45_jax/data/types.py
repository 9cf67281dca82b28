"""What crosses the doors of the data room: `Doc` on the way in, `Batch` on the way out.

Letters: `B` rows of one host's batch, `T` tokens of a row.
"""

import flax.struct
import jax

# Defined beside the sources, which must not import jax; at home here for everybody else.
from glm45_jax.data.sources import Doc as Doc

# numpy from the loader, jax in the step; one name, because nobody needs to tell them apart.
Array = jax.Array


@flax.struct.dataclass
class Batch:
    """Rows to learn from; numpy on leaving the loader, global arrays in the train step.

    For every row b and place t:
    - targets_BT[b, t] is the token to predict after tokens_BT[b, : t + 1]. It counts only where
      mask_BT is 1; elsewhere it is some id of the vocabulary and must not matter.
    - segments_BT numbers the documents of a row 1, 2, ... from the left; 0 is padding, only at the
      end of a row. A query may look at a key only within one segment.
    - positions_BT (for RoPE) rises by 1 inside a segment and starts at 0 in each; 0 on padding.
    - mask_BT is 0 on padding and, where segments stand for documents, on the last token of each.
    """

    tokens_BT: Array  # int32
    targets_BT: Array  # int32
    segments_BT: Array  # int32
    positions_BT: Array  # int32
    mask_BT: Array  # float32, 0 or 1
