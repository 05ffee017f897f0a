"""Sparse dictionaries as values: torch and nothing else."""

from ._activation import Activation as Activation
from ._activation import BatchTopK as BatchTopK
from ._activation import JumpReLU as JumpReLU
from ._activation import ReLU as ReLU
from ._activation import TopK as TopK
from ._cross_layer import CrossLayer as CrossLayer
from ._cross_layer import Layer as Layer
from ._encode import Encoder as Encoder
from ._kernels import row_offsets as row_offsets
from ._kernels import sampled_products as sampled_products
from ._kernels import triton_runs as triton_runs
from ._kernels import weighted_sums as weighted_sums
from ._origin import Origin as Origin
from ._sae import SAE as SAE
from ._screen import screens_pay as screens_pay
from ._sparse import SparseFeatures as SparseFeatures

Dictionary = SAE | CrossLayer
"""Anything that encodes activations into features and decodes them: one interface for both."""
