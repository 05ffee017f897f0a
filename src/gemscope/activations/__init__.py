"""Activations for training: harvested, shuffled, resumable."""

from ._stream import ActivationBatch as ActivationBatch
from ._stream import ActivationStream as ActivationStream
from ._stream import Position as Position
