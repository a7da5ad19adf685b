"""gptlit: train GPT-2-style models with PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptlit.config import GPT_CONFIG_124M, PRESETS, GPTConfig
    from gptlit.data.datamodule import TokenDataModule
    from gptlit.model import GPTModel
    from gptlit.module import GPTModule

__version__ = "0.1.0"

__all__ = ["GPT_CONFIG_124M", "PRESETS", "GPTConfig", "GPTModel", "GPTModule", "TokenDataModule"]

# Loaded on first use: `import gptlit` must not wait for torch.
_HOME = {
    "GPT_CONFIG_124M": "gptlit.config",
    "PRESETS": "gptlit.config",
    "GPTConfig": "gptlit.config",
    "GPTModel": "gptlit.model",
    "GPTModule": "gptlit.module",
    "TokenDataModule": "gptlit.data.datamodule",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gptlit' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
