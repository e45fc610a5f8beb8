"""LoRA Lab: what the course's notebooks share. Import the modules: `from helpers import data, models, training`."""

import logging
import warnings

__version__ = "0.1.0"

# On CPUs with AVX512-BF16, bitsandbytes says at import that an optional kernel, fetched from a model hub at run time,
# is missing. It works without it, and this package fetches no code.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# PEFT up to 0.21 asks transformers 5.23 and newer for a property by its old name, in every get_peft_model.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
