"""Every command's options: one frozen dataclass each, and how text becomes their values.

No heavy import here: `lomar --help` reads these files alone.
"""

from lomar.options.benchmarking import BenchmarkOptions
from lomar.options.detection import DetectEvaluateOptions, DetectOptions, DetectPredictOptions
from lomar.options.downstream import (
    EmbedOptions,
    EvaluateOptions,
    FinetuneOptions,
    KnnOptions,
    MapOptions,
    PredictOptions,
    ProbeOptions,
)
from lomar.options.fields import (
    AUTO,
    LARGEST_SEED,
    command_line,
    convert,
    converted,
    fields_of,
    flag,
    kind_of,
    option,
    read_config,
    suggestion,
)
from lomar.options.pictures import AttentionOptions, ReconstructOptions
from lomar.options.preparing import PrepareOptions
from lomar.options.pretraining import PretrainOptions, RecipesOptions, TokenizerOptions
from lomar.options.reporting import ReportOptions
from lomar.options.studying import StudyOptions
from lomar.options.weights import ConvertOptions, ExportOptions

__all__ = [
    "AUTO",
    "LARGEST_SEED",
    "AttentionOptions",
    "BenchmarkOptions",
    "ConvertOptions",
    "DetectEvaluateOptions",
    "DetectOptions",
    "DetectPredictOptions",
    "EmbedOptions",
    "EvaluateOptions",
    "ExportOptions",
    "FinetuneOptions",
    "KnnOptions",
    "MapOptions",
    "PredictOptions",
    "PrepareOptions",
    "PretrainOptions",
    "ProbeOptions",
    "RecipesOptions",
    "ReconstructOptions",
    "ReportOptions",
    "StudyOptions",
    "TokenizerOptions",
    "command_line",
    "convert",
    "converted",
    "fields_of",
    "flag",
    "kind_of",
    "option",
    "read_config",
    "suggestion",
]
