"""Training dictionaries by the published recipe."""

from ._config import TrainConfig as TrainConfig
from ._config import parse_config as parse_config
from ._config import read_config as read_config
from ._run import Stopped as Stopped
from ._run import smoke_test as smoke_test
from ._run import train as train
from ._trainer import Progress as Progress
from ._trainer import Trainer as Trainer
