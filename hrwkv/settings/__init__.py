"""The values of a recipe: one frozen dataclass per verb, filled from TOML and flags, checked whole at once.

They are plain data without torch, so a command can read, print and compare a recipe before anything loads.
Each field's meaning stands in its docstring; what only the data or the model can tell is checked there.
"""

from hrwkv.settings.bench import BenchSettings
from hrwkv.settings.convert import INITIALISATIONS, ConvertSettings, ImportSettings
from hrwkv.settings.data import DataSettings
from hrwkv.settings.distill import DistillSettings, StageSettings
from hrwkv.settings.engine import EngineSettings
from hrwkv.settings.evaluate import DemoSettings, EvalSettings
from hrwkv.settings.plan import PlanSettings
from hrwkv.settings.select import SelectSettings
from hrwkv.settings.serve import ServeSettings

__all__ = [
    "INITIALISATIONS",
    "BenchSettings",
    "ConvertSettings",
    "DataSettings",
    "DemoSettings",
    "DistillSettings",
    "EngineSettings",
    "EvalSettings",
    "ImportSettings",
    "PlanSettings",
    "SelectSettings",
    "ServeSettings",
    "StageSettings",
]
