"""Sparse autoencoders and transcoders as values: torch and nothing else."""

from ._activation import Activation as Activation
from ._activation import BatchTopK as BatchTopK
from ._activation import JumpReLU as JumpReLU
from ._activation import ReLU as ReLU
from ._activation import TopK as TopK
from ._sae import SAE as SAE
from ._sae import Origin as Origin
from ._sparse import SparseFeatures as SparseFeatures
