"""Validation after the last step, and a sample after each validation."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from gptlit.data.templates import find_template
from gptlit.generation import TEMPERATURE, TOP_K
from gptlit.generation.generate import generate
from gptlit.training.lightning_compat import is_validation_of_fit, run_validation
from gptlit.training.module import GPTModule
from gptlit.training.tensorboard import log_text


class FinalValidation(Callback):
    """Also validates after the last step, and when a run is resumed at a step whose validation was skipped because the
    run was stopped before it.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self.last_step = -1

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self.last_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_step = state_dict["last_step"]

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        if step > 0 and step % self.every_n_steps == 0 and self.last_step < step:
            run_validation(trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_validation_of_fit(trainer):
            self.last_step = trainer.global_step

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step >= trainer.max_steps > 0:
            trainer.should_stop = True  # makes Lightning validate once more


class SampleText(Callback):
    """Continues a prompt after each validation: in TensorBoard's text tab and on the terminal.

    Args:
        prompt: Text to continue.
        max_new_tokens: Length of the continuation.
        seed: Seed of the sampling, the same each time, so that only the model changes.
    """

    def __init__(self, prompt: str, max_new_tokens: int = 48, seed: int = 0) -> None:
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.text = ""

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, GPTModule)
        if not is_validation_of_fit(trainer) or pl_module.config.n_classes:
            return
        # Every rank samples: a sharded model needs them all.
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        tokenizer = datamodule.tokenizer
        template = getattr(datamodule, "template", None)
        ids = tokenizer.encode_ordinary(self.prompt)
        if template is not None:
            ids = find_template(template).prompt(tokenizer, [{"role": "user", "content": self.prompt}])
        prompt = torch.tensor([ids], device=pl_module.device)
        generator = torch.Generator(pl_module.device).manual_seed(self.seed)
        sampling: Any = {"temperature": TEMPERATURE, "top_k": TOP_K, "generator": generator}
        end = None if template is None else tokenizer.eot_token
        with trainer.precision_plugin.forward_context():
            text = generate(pl_module.model, prompt, self.max_new_tokens, eos_id=end, **sampling)
        self.text = tokenizer.decode(text[0].tolist())
        log_text(trainer, "samples", "\n".join("    " + line for line in self.text.splitlines()))
