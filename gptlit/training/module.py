"""GPTModule, the LightningModule: the step, what is logged, the optimizer and its schedule."""

import hashlib
import math
import os
from dataclasses import asdict, fields
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Timer
from torch import Tensor
from torch.optim import AdamW

from gptlit.checkpoint.pretrained import check_tokenizer, copy_weights, read_source
from gptlit.config import GPTConfig
from gptlit.errors import InputError, note
from gptlit.model.gpt import GPTModel, TransformerBlock
from gptlit.model.loss import chunked_softmax_, linear_cross_entropy, softmax_
from gptlit.training.distributed import gradient_norm, sharded_model
from gptlit.training.lightning_compat import configure_compiler
from gptlit.training.optimizer import OptimizerName, Schedule, ScheduleName, make_optimizer, set_values
from gptlit.training.supported import check_trainer, is_averaging


class GPTModule(pl.LightningModule):
    """Trains a GPTModel on (inputs, targets), int64 (B, T) each.

    Logged each `trainer.log_every_n_steps` optimizer steps: train/loss (mean of the global batch), train/grad_norm
    (before clipping), train/tokens (seen so far, all devices), lr, and train/skipped_steps once there is one. After
    each validation: val/loss, val/perplexity.

    A step whose gradient is not finite changes nothing and is counted. Dropout is seeded for each micro-batch from the
    run's seed and the step, so that a resumed run draws what an uninterrupted one would.

    Args:
        config: The architecture; the seven keys of the book and two more.
        optimizer: "adamw", or "muon" for the matrices inside the blocks and AdamW for the rest.
        lr: Learning rate at the end of the warm-up.
        schedule: "cosine" falls to `min_lr` at the last step, "constant" stays at `lr`.
        initial_lr: Learning rate of the first step of a warm-up.
        min_lr: Learning rate at the end of the cosine.
        warmup_steps: Optimizer steps from `initial_lr` to `lr`.
        weight_decay: Decay of matrices.
        decay_all: Decay biases, norms and everything else too.
        beta1: AdamW's decay of the gradient's running mean.
        beta2: AdamW's decay of the running mean of its square.
        compile: Compile the blocks with torch.compile (needs a C++ compiler on a CPU). Checkpoints stay the same.
        activation_checkpointing: Keep only the input of each block, and compute the block again on the way back: much
            less memory for a third more time.
        init_from: Where to take the first weights from: a checkpoint or a run's folder, a Hugging Face folder or
            `hf:NAME`, the book's `.pth`, nanoGPT's `ckpt.pt`. Everything else starts anew.

    Raises:
        ValueError: A value is out of its range.
    """

    model: GPTModel

    def __init__(
        self,
        config: GPTConfig = GPTConfig(),  # noqa: B008  (frozen)
        optimizer: OptimizerName = "adamw",
        lr: float = 6e-4,
        schedule: ScheduleName = "cosine",
        initial_lr: float = 1e-5,
        min_lr: float = 6e-5,
        warmup_steps: int = 0,
        weight_decay: float = 0.1,
        decay_all: bool = False,
        beta1: float = 0.9,
        beta2: float = 0.95,
        compile: bool = False,
        activation_checkpointing: bool = False,
        init_from: str | None = None,
    ) -> None:
        super().__init__()
        for key, value in {"lr": lr, "initial_lr": initial_lr, "min_lr": min_lr, "weight_decay": weight_decay}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"model.{key} must be a number of at least 0, got {value}")
        for key, value in {"beta1": beta1, "beta2": beta2}.items():
            if not 0 <= value < 1:
                raise ValueError(f"model.{key} must be at least 0 and below 1, got {value}")
        for key, name, known in (
            ("schedule", schedule, get_args(ScheduleName)),
            ("optimizer", optimizer, get_args(OptimizerName)),
        ):
            if name not in known:
                raise ValueError(f"model.{key} must be one of {', '.join(known)}, got {name!r}")
        if warmup_steps < 0:
            raise ValueError(f"model.warmup_steps must be at least 0, got {warmup_steps}")
        self.config = GPTConfig(**config) if isinstance(config, dict) else config  # a dict: from a checkpoint
        self.schedule = Schedule(schedule, initial_lr, lr, min_lr, warmup_steps)
        self.optimizer_name = optimizer
        self._values: Any = {"weight_decay": weight_decay, "decay_all": decay_all, "betas": (beta1, beta2)}
        self.compile_model = compile
        self._softmax = torch.compile(softmax_, dynamic=False) if compile else chunked_softmax_
        self.activation_checkpointing = activation_checkpointing
        self.init_from = init_from
        self.tokens = 0  # of the optimizer steps since the run began, all devices
        self._step_tokens = 0  # of the micro-batches of one optimizer step
        self.skipped_steps = 0  # those before this fit; `_skipped` counts on, on the device
        self._skipped = self._in_a_row = torch.zeros(())
        self._losses: list[Tensor] = []  # of the micro-batches of one optimizer step, on the device
        self.save_hyperparameters(
            {
                "config": asdict(self.config),
                "optimizer": optimizer,
                "lr": lr,
                "schedule": schedule,
                "initial_lr": initial_lr,
                "min_lr": min_lr,
                "warmup_steps": warmup_steps,
                "weight_decay": weight_decay,
                "decay_all": decay_all,
                "beta1": beta1,
                "beta2": beta2,
                "compile": compile,
                "activation_checkpointing": activation_checkpointing,
            }
        )

    def setup(self, stage: str) -> None:
        """Check what the Trainer was given.

        Raises:
            InputError: It would train wrongly or not at all.
        """
        check_trainer(self.trainer)

    def configure_model(self) -> None:
        """Build the model, once; Lightning calls this when the devices are known."""
        if hasattr(self, "model"):
            return
        device = torch.device("cpu") if self._trainer is None else self.trainer.strategy.root_device
        mesh = self.device_mesh  # only a strategy that shards has one
        if mesh is None:
            with torch.device("cpu"):  # a seed gives the same weights on any device
                self.model = GPTModel(self.config)
        else:
            self.model = sharded_model(self.config, mesh["data_parallel"], device)
        if self.init_from is not None:
            source = read_source(self.init_from)
            if (data := getattr(self._trainer, "datamodule", None)) is not None and hasattr(data, "tokenizer"):
                check_tokenizer(source, data.tokenizer)
            copy_weights(self.model, source)
        if self.compile_model:
            configure_compiler(device)
        for block in self.model.trf_blocks:
            assert isinstance(block, TransformerBlock)
            block.activation_checkpointing = self.activation_checkpointing
            if self.compile_model:
                block.compile()  # in place: the keys of the state dict stay as they are

    def forward(self, token_ids: Tensor) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V)."""
        return self.model(token_ids)  # type: ignore[no-any-return]

    # --- training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of one micro-batch."""
        inputs, targets = batch
        if self.config.drop_rate:
            torch.manual_seed(self._micro_batch_seed())
        loss = self._loss(inputs, targets, "mean")
        self._losses.append(loss.detach())
        self._step_tokens += inputs.numel() * self.trainer.world_size
        return loss

    def _loss(self, inputs: Tensor, targets: Tensor, reduction: Literal["mean", "sum"]) -> Tensor:
        hidden = self.model.hidden(inputs)  # first: it gathers a sharded head
        return linear_cross_entropy(hidden, self.model.out_head.weight, targets, reduction, self._softmax)

    def _micro_batch_seed(self) -> int:
        """Return a number that follows from the run's seed, the step, the micro-batch in it, and the device."""
        words = f"{self._seed} {self.global_step} {len(self._losses)} {self.global_rank}"
        return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big", signed=True)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the learning rate of this step: a function of the step alone, so nothing of it is in a checkpoint."""
        for group in optimizer.param_groups:
            group["lr"] = self.schedule.at(self.global_step, self._max_steps)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as `trainer.gradient_clip_val` says, pass over what is not finite, log what belongs to the step."""
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.tokens, self._step_tokens = self.tokens + self._step_tokens, 0
        norm = self._clip(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self._guard(optimizer, norm)
        if self.trainer._logger_connector.should_update_logs:
            loss = torch.stack(self._losses).mean()
            self.log("train/loss", loss, sync_dist=True)
            self.log("train/grad_norm", norm)
            self.log("train/tokens", float(self.tokens))
            self.log("lr", optimizer.param_groups[0]["lr"])
            if skipped := self.total_skipped:
                self.log("train/skipped_steps", float(skipped))
        self._losses.clear()

    def _guard(self, optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
        """Let a step with a gradient that is not finite change nothing, and count it.

        The fused AdamW is told on the device, so that nobody waits for the result; the others are left without
        gradients. (Mixed fp16 has a guard of its own in its gradient scaler.)
        """
        if self.trainer.precision == "16-mixed":
            return
        found = (~norm.isfinite()).float()
        self._skipped += found
        self._in_a_row = (self._in_a_row + 1) * found
        if self._supports_fused_unscale(optimizer):
            optimizer.found_inf = found  # type: ignore[attr-defined]
        elif found.item():
            optimizer.zero_grad(set_to_none=True)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Free the gradients at once: Lightning would keep them beside the activations of the next step."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    @property
    def is_between_steps(self) -> bool:
        """Whether no micro-batch of the next optimizer step has been made yet."""
        return not self._losses

    @property
    def total_skipped(self) -> int:
        """Steps that were passed over since the run began. Waits for the device."""
        return self.skipped_steps + int(self._skipped.item())

    @property
    def skipped_in_a_row(self) -> int:
        """Steps that were passed over since the last good one. Waits for the device."""
        return int(self._in_a_row.item())

    def _clip(self, optimizer: torch.optim.Optimizer, limit: float | None, algorithm: str | None) -> Tensor:
        """Return the norm of the gradient before it is clipped. A fused AdamW scales it itself, without a pass more."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = gradient_norm(parameters)
        if limit and algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, limit)
        elif limit and self._supports_fused_unscale(optimizer):
            optimizer.grad_scale = ((norm + 1e-6) / limit).clamp(min=1.0)  # type: ignore[attr-defined]
        elif limit:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm

    def _supports_fused_unscale(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimizer takes a scale and a sign that the gradient is not finite on the device."""
        return isinstance(optimizer, AdamW) and bool(optimizer.defaults.get("fused"))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the optimizer. A fused AdamW would unscale fp16 gradients itself, after they have been clipped."""
        fused = self._trainer is None or self._trainer.precision != "16-mixed"
        return make_optimizer(self.model, self.optimizer_name, lr=self.schedule.peak, fused=fused, **self._values)

    def on_train_start(self) -> None:
        """After a resume the configuration's values hold, not the checkpoint's; the schedule's length is known now."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        set_values(optimizer, **self._values)
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        self._skipped, self._in_a_row = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        self._losses.clear()
        self._step_tokens = 0  # a fit before this one may have ended inside an accumulation window
        steps = self.trainer.max_steps
        self._max_steps = steps if steps > 0 else int(self.trainer.estimated_stepping_batches)

    # --- evaluation ---------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Begin the sums anew. They are float32, whatever the type of the weights."""
        self._sums = torch.zeros(2, dtype=torch.float32, device=self.device)  # of losses, of tokens

    def on_test_epoch_start(self) -> None:
        """Begin the sums anew."""
        self.on_validation_epoch_start()

    def _evaluate(self, batch: tuple[Tensor, Tensor]) -> None:
        inputs, targets = batch
        self._sums += torch.stack([self._loss(inputs, targets, "sum"), (targets >= 0).sum()])

    def _log_mean(self, name: str) -> None:
        total, count = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        loss = total / count
        self.log(f"{name}/loss", loss)
        self.log(f"{name}/perplexity", loss.exp())
        known = getattr(getattr(self.trainer, "datamodule", None), "bytes_per_token", None)
        if known is not None and name in (ratios := known()):
            self.log(f"{name}/bits_per_byte", loss / math.log(2) / ratios[name])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add one batch to val/loss."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log val/loss, nats a token over all devices, and its exponential."""
        self._log_mean("val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add one batch to test/loss."""
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        """Log test/loss and test/perplexity."""
        self._log_mean("test")

    # --- checkpoints --------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the tokens seen; leave out Lightning's loop counters, which count micro-batches of one device."""
        checkpoint["tokens"] = self.tokens
        checkpoint["skipped_steps"] = self.total_skipped
        del checkpoint["loops"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another architecture; before a fit, go on counting where the checkpoint stopped.

        Raises:
            InputError: A key of the architecture differs; it is named, with both values.
        """
        theirs = checkpoint["hyper_parameters"]["config"]
        is_fit = self._trainer is not None and self._trainer.state.fn == "fit"
        optimizer = checkpoint["hyper_parameters"].get("optimizer", self.optimizer_name)
        if is_fit and optimizer != self.optimizer_name:
            raise InputError(
                f"model.optimizer is {self.optimizer_name!r}, but the checkpoint was trained with {optimizer!r}: "
                "set it to that, or start a new run with --model.init_from"
            )
        for field in fields(GPTConfig):
            ours = getattr(self.config, field.name)
            if field.name != "drop_rate" and theirs.get(field.name) != ours:
                raise InputError(
                    f"model.config.{field.name} is {ours}, but the checkpoint was trained with "
                    f"{theirs.get(field.name)}: set it to that, or start a new run"
                )
        if is_fit and "current_model_state" in checkpoint and not is_averaging(self.trainer):
            note("the checkpoint has averaged weights too: the run goes on with the others, without an average")
            checkpoint["state_dict"] = checkpoint["current_model_state"]
        self.tokens, self.skipped_steps = checkpoint.get("tokens", 0), checkpoint.get("skipped_steps", 0)
        if is_fit:
            self._set_step(self.trainer, checkpoint["global_step"])
            for timer in (callback for callback in self.trainer.callbacks if isinstance(callback, Timer)):  # type: ignore[attr-defined]
                checkpoint.get("callbacks", {}).pop(timer.state_key, None)  # trainer.max_time is that of each start

    def _set_step(self, trainer: pl.Trainer, step: int) -> None:
        """Let Lightning count on from `step` optimizer steps, with the accumulation of this run.

        A run goes on as a fresh loop whose totals begin higher: nothing of Lightning's own restart logic, which
        counts micro-batches of one device, is involved.
        """
        loop = trainer.fit_loop.epoch_loop
        micro_batches = step * trainer.accumulate_grad_batches
        for counter in ("ready", "started", "processed", "completed"):
            setattr(loop.batch_progress.total, counter, micro_batches)
        progress = loop.automatic_optimization.optim_progress.optimizer.step.total
        progress.ready = progress.completed = step
        loop._batches_that_stepped = step
