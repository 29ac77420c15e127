"""Configuration: frozen dataclasses, filled from YAML and the command line by jsonargparse.

An unknown key, a wrong type or a value out of range is an error that names it.
"""

from regrpo.config.benchmark import BenchmarkConfig, EndpointConfig
from regrpo.config.data import (
    DataConfig,
    DataExportConfig,
    DataImportConfig,
    DataMineConfig,
    DataStatsConfig,
    DataVerifyConfig,
    TableConfig,
    TeacherConfig,
)
from regrpo.config.evaluation import (
    DemoConfig,
    EvalConfig,
    ExperimentConfig,
    ReportConfig,
    RunConfig,
)
from regrpo.config.options import OptionsConfig
from regrpo.config.plan import PlanConfig
from regrpo.config.rewards import RewardConfig
from regrpo.config.rollout import RolloutConfig
from regrpo.config.run import TRACKERS, LoraSettings, OptimConfig
from regrpo.config.supervised import PretrainConfig, SFTConfig, SourceConfig
from regrpo.config.tasks import TaskConfig
from regrpo.config.train import CANDIDATES, TrainConfig
from regrpo.config.trigger import TriggerConfig
from regrpo.config.vision import VisionDemoConfig, VisionPretrainConfig

__all__ = [
    "CANDIDATES",
    "TRACKERS",
    "BenchmarkConfig",
    "DataConfig",
    "DataExportConfig",
    "DataImportConfig",
    "DataMineConfig",
    "DataStatsConfig",
    "DataVerifyConfig",
    "DemoConfig",
    "EndpointConfig",
    "EvalConfig",
    "ExperimentConfig",
    "LoraSettings",
    "OptimConfig",
    "OptionsConfig",
    "PlanConfig",
    "PretrainConfig",
    "ReportConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "SourceConfig",
    "TableConfig",
    "TaskConfig",
    "TeacherConfig",
    "TrainConfig",
    "TriggerConfig",
    "VisionDemoConfig",
    "VisionPretrainConfig",
]
