"""Steering and intervening: edits of features as values, and what they do to the model."""

from ._attribute import Attribution as Attribution
from ._attribute import attribute as attribute
from ._attribute_exact import agreement as agreement
from ._change import Change as Change
from ._intervene import Intervention as Intervention
from ._intervene import Outcome as Outcome
from ._intervene import intervene as intervene
from ._maxima import load_feature as load_feature
from ._maxima import maximum_of as maximum_of
from ._modes import UNITS as UNITS
from ._modes import Mode as Mode
from ._modes import Strength as Strength
from ._modes import Unit as Unit
from ._parts import Direction as Direction
from ._parts import Feature as Feature
from ._parts import feature as feature
from ._positions import Positions as Positions
from ._positions import Schedule as Schedule
from ._steer import Steered as Steered
from ._steer import change_of as change_of
from ._steer import model_of as model_of
from ._steer import steer as steer
from ._steering import Steering as Steering
from ._target import address_of as address_of
