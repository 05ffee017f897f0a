"""Activations for training: made on the fly or stored, shuffled, resumable."""

from ._harvest import Stopped as Stopped
from ._harvest import harvest as harvest
from ._manifest import Manifest as Manifest
from ._place import write_whole as write_whole
from ._signals import stop_signals as stop_signals
from ._source import ActivationBatch as ActivationBatch
from ._source import Position as Position
from ._source import Source as Source
from ._store import ActivationStore as ActivationStore
from ._store import open_store as open_store
from ._stream import ActivationStream as ActivationStream
