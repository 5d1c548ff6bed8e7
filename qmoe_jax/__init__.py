# SPDX-License-Identifier: Apache-2.0
"""Sub-1-bit compression and inference of Mixture-of-Experts models in JAX."""

from qmoe_jax.calibration.text import Text as Text
from qmoe_jax.checkpoints.errors import CheckpointError as CheckpointError
from qmoe_jax.inference.beam_search import Beams as Beams
from qmoe_jax.inference.decoding import Sampling as Sampling
from qmoe_jax.inference.text_model import load as load
from qmoe_jax.quantization.quantizer import Quantizer as Quantizer
from qmoe_jax.runs.compress import Compute as Compute
from qmoe_jax.runs.compress import compress as compress
from qmoe_jax.runs.evaluate import evaluate as evaluate
from qmoe_jax.runs.train import train as train
from qmoe_jax.training.batches import TrainingText as TrainingText

__version__ = "0.1.0"
