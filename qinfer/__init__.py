"""qinfer runs quantized language models on any GPU that Triton reaches, with nothing to compile."""

from qinfer.engine.generator import Completion, Event, Generator
from qinfer.engine.sampling import SamplingParams
from qinfer.models.model import Model
from qinfer.parallel.context import TPContext

__version__ = "0.1.0"
__all__ = ["Completion", "Event", "Generator", "Model", "SamplingParams", "TPContext", "__version__"]
