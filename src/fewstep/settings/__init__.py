"""Settings of every command, as frozen, validated trees: tree.py the machinery, the others what there is to set."""

from fewstep.settings.common import ComputeSettings, OptimizerSettings, RunSettings, TrainingSettings
from fewstep.settings.data import DataSettings, TrainDataSettings
from fewstep.settings.losses import LossSettings
from fewstep.settings.memory import MemorySettings
from fewstep.settings.pretrain import NetworkSettings, PretrainNoiseSettings, PretrainSettings
from fewstep.settings.train import (
    BestSettings,
    GeneratorSettings,
    TeacherSettings,
    TrainOptimizerSettings,
    TrainSettings,
    refuse_unread,
)
from fewstep.settings.tree import (
    Tree,
    describe_settings,
    flatten_settings,
    lay_over,
    load_settings,
    parse_settings,
    renew_settings,
)

__all__ = [
    "BestSettings",
    "ComputeSettings",
    "DataSettings",
    "GeneratorSettings",
    "LossSettings",
    "MemorySettings",
    "NetworkSettings",
    "OptimizerSettings",
    "PretrainNoiseSettings",
    "PretrainSettings",
    "RunSettings",
    "TeacherSettings",
    "TrainDataSettings",
    "TrainOptimizerSettings",
    "TrainSettings",
    "TrainingSettings",
    "Tree",
    "describe_settings",
    "flatten_settings",
    "lay_over",
    "load_settings",
    "parse_settings",
    "refuse_unread",
    "renew_settings",
]
