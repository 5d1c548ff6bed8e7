# SPDX-License-Identifier: Apache-2.0
"""Where the sparse layers of a model lie, for `t5x_configs/models`, which counts them."""


def mixed_layout(num_layers: int, num_sparse_layers: int) -> tuple[int, ...]:
    """Indices of sparse layers spread evenly through a stack (flaxformer: `LayerLayout.MIXED`).

    Every s-th layer is sparse, s = num_layers // num_sparse_layers, counted so that a dense layer
    comes first: 12 layers of which 6 are sparse give 1, 3, ..., 11.

    Raises:
      ValueError: the layers cannot be spread evenly.
    """
    if num_sparse_layers == 0:
        return ()
    if not 0 < num_sparse_layers <= num_layers or num_layers % num_sparse_layers:
        raise ValueError(
            f"{num_sparse_layers} sparse layers cannot be spread evenly over {num_layers}: "
            "NUM_ENCODER_SPARSE_LAYERS must divide NUM_ENCODER_LAYERS (decoder likewise)"
        )
    every = num_layers // num_sparse_layers
    return tuple(range(every - 1, num_layers, every))
