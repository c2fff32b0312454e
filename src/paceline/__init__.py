"""Paceline: plan, prove, train, checkpoint and serve large models in parallel, on one plan file.

Names are looked up when they are first used, so that ``import paceline`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NoReturn

__version__ = "0.1.0"

_NAMES = {
    "load": "paceline.api.load:load",
    "load_plan": "paceline.api.load:load_plan",
    "LoadedModel": "paceline.api.load:LoadedModel",
    "parallelize": "paceline.parallel.module:parallelize",
    "clip_gradients": "paceline.parallel.gradients:clip_gradients",
    "whole_state": "paceline.parallel.whole:whole_state",
    "save_checkpoint": "paceline.api.checkpoint:save_checkpoint",
    "load_checkpoint": "paceline.api.checkpoint:load_checkpoint",
    "tensor_rules_of": "paceline.parallel.spread:tensor_rules_of",
    "global_mean": "paceline.optim.scale:global_mean",
    "verify": "paceline.verify:",
    "Certificate": "paceline.verify.certify:Certificate",
    "Trainer": "paceline.api.trainer:Trainer",
    "StepRecord": "paceline.train.records:StepRecord",
    "Engine": "paceline.api.engine:Engine",
    "Answer": "paceline.serve.engine:Answer",
    "plan": "paceline.plan:",
    "simulate": "paceline.api.simulate:simulate",
    "Plan": "paceline.plan.plan:Plan",
    "MeshConfig": "paceline.plan.mesh:MeshConfig",
    "ZeroConfig": "paceline.plan.plan:ZeroConfig",
    "TensorConfig": "paceline.plan.plan:TensorConfig",
    "PipelineConfig": "paceline.plan.plan:PipelineConfig",
    "ContextConfig": "paceline.plan.plan:ContextConfig",
    "ExpertConfig": "paceline.plan.plan:ExpertConfig",
    "MemoryConfig": "paceline.plan.plan:MemoryConfig",
    "PrecisionConfig": "paceline.plan.plan:PrecisionConfig",
    "ReplicasConfig": "paceline.plan.plan:ReplicasConfig",
    "TrainConfig": "paceline.plan.plan:TrainConfig",
    "PeftConfig": "paceline.plan.plan:PeftConfig",
    "OptimizerConfig": "paceline.plan.plan:OptimizerConfig",
    "ScheduleConfig": "paceline.plan.plan:ScheduleConfig",
    "CheckpointConfig": "paceline.plan.plan:CheckpointConfig",
    "ResilienceConfig": "paceline.plan.plan:ResilienceConfig",
    "ServeConfig": "paceline.plan.plan:ServeConfig",
    "ServeMeshConfig": "paceline.plan.plan:ServeMeshConfig",
    "ModelSpec": "paceline.plan.model_spec:ModelSpec",
    "PacelineError": "paceline.core.errors:PacelineError",
    "UsageError": "paceline.core.errors:UsageError",
    "ConfigError": "paceline.core.errors:ConfigError",
    "DataError": "paceline.core.errors:DataError",
    "RankError": "paceline.core.errors:RankError",
    "RequestError": "paceline.core.errors:RequestError",
}
"""Public name to where it is; ``module:`` is a package that can be called."""

if TYPE_CHECKING:
    from paceline.api.checkpoint import load_checkpoint as load_checkpoint
    from paceline.api.checkpoint import save_checkpoint as save_checkpoint
    from paceline.api.engine import Engine as Engine
    from paceline.api.load import LoadedModel as LoadedModel
    from paceline.api.load import load as load
    from paceline.api.load import load_plan as load_plan
    from paceline.api.simulate import simulate as simulate
    from paceline.api.trainer import Trainer as Trainer
    from paceline.core.errors import ConfigError as ConfigError
    from paceline.core.errors import DataError as DataError
    from paceline.core.errors import PacelineError as PacelineError
    from paceline.core.errors import RankError as RankError
    from paceline.core.errors import RequestError as RequestError
    from paceline.core.errors import UsageError as UsageError
    from paceline.optim.scale import global_mean as global_mean
    from paceline.parallel.gradients import clip_gradients as clip_gradients
    from paceline.parallel.module import parallelize as parallelize
    from paceline.parallel.spread import tensor_rules_of as tensor_rules_of
    from paceline.parallel.whole import whole_state as whole_state
    from paceline.plan.mesh import MeshConfig as MeshConfig
    from paceline.plan.model_spec import ModelSpec as ModelSpec
    from paceline.plan.plan import CheckpointConfig as CheckpointConfig
    from paceline.plan.plan import ContextConfig as ContextConfig
    from paceline.plan.plan import ExpertConfig as ExpertConfig
    from paceline.plan.plan import MemoryConfig as MemoryConfig
    from paceline.plan.plan import OptimizerConfig as OptimizerConfig
    from paceline.plan.plan import PeftConfig as PeftConfig
    from paceline.plan.plan import PipelineConfig as PipelineConfig
    from paceline.plan.plan import Plan as Plan
    from paceline.plan.plan import PrecisionConfig as PrecisionConfig
    from paceline.plan.plan import ReplicasConfig as ReplicasConfig
    from paceline.plan.plan import ResilienceConfig as ResilienceConfig
    from paceline.plan.plan import ScheduleConfig as ScheduleConfig
    from paceline.plan.plan import ServeConfig as ServeConfig
    from paceline.plan.plan import ServeMeshConfig as ServeMeshConfig
    from paceline.plan.plan import TensorConfig as TensorConfig
    from paceline.plan.plan import TrainConfig as TrainConfig
    from paceline.plan.plan import ZeroConfig as ZeroConfig
    from paceline.serve.engine import Answer as Answer
    from paceline.train.records import StepRecord as StepRecord
    from paceline.verify import verify as verify
    from paceline.verify.certify import Certificate as Certificate

    def plan(*_arguments: object, **_options: object) -> NoReturn: ...


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module_name, attribute = _NAMES[name].split(":")
    module = importlib.import_module(module_name)
    return getattr(module, attribute) if attribute else module


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
