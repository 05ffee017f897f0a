"""Training dictionaries by the published recipes: many per model pass, sparse, resumable."""

from ._config import Artefact as Artefact
from ._config import TrainConfig as TrainConfig
from ._floor import Floor as Floor
from ._floor import Machine as Machine
from ._floor import floor_seconds as floor_seconds
from ._floor import measure_machine as measure_machine
from ._metrics import Standing as Standing
from ._read import parse_config as parse_config
from ._read import read_config as read_config
from ._read import width as width
from ._report import write_training_report as write_training_report
from ._run import Stopped as Stopped
from ._run import train as train
from ._smoke import smoke_test as smoke_test
from ._trainer import Progress as Progress
from ._trainer import Trainer as Trainer
