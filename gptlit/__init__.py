"""gptlit: train GPT-2-style models with PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptlit.checkpoint.export import save_pretrained as save_pretrained
    from gptlit.checkpoint.pretrained import load_pretrained as load_pretrained
    from gptlit.config import GPT_CONFIG_124M as GPT_CONFIG_124M
    from gptlit.config import PRESETS as PRESETS
    from gptlit.config import GPTConfig as GPTConfig
    from gptlit.data.datamodule import TokenDataModule as TokenDataModule
    from gptlit.data.tokenizer import load_tokenizer as load_tokenizer
    from gptlit.generation.generate import generate as generate
    from gptlit.model.gpt import GPTModel as GPTModel
    from gptlit.training.module import GPTModule as GPTModule

__version__ = "0.1.0"

# Imported on first use: `import gptlit` imports neither torch nor lightning.
_MODULES = {
    "GPT_CONFIG_124M": "gptlit.config",
    "PRESETS": "gptlit.config",
    "GPTConfig": "gptlit.config",
    "GPTModel": "gptlit.model.gpt",
    "GPTModule": "gptlit.training.module",
    "TokenDataModule": "gptlit.data.datamodule",
    "generate": "gptlit.generation.generate",
    "load_pretrained": "gptlit.checkpoint.pretrained",
    "load_tokenizer": "gptlit.data.tokenizer",
    "save_pretrained": "gptlit.checkpoint.export",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'gptlit' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
