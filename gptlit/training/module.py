"""GPTModule, the LightningModule: the training step, what is logged, the optimizer and its schedule."""

import hashlib
import math
import os
from dataclasses import asdict, replace
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix
from typing_extensions import override

from gptlit.checkpoint.pretrained import HUB, adapt_head, check_tokenizer, copy_weights, read_weights
from gptlit.config import GPTConfig
from gptlit.data.datamodule import TokenDataModule
from gptlit.data.windows import NO_TARGET
from gptlit.generation.fast_linear import check_compiler
from gptlit.model.gpt import GPTModel, TransformerBlock
from gptlit.model.lora import LoRAConfig, build_model, merged_weight
from gptlit.model.loss import at_labels, chunked_softmax_, linear_cross_entropy, next_token_loss, softmax_
from gptlit.training.distributed import FSDP2Strategy, sharded_model
from gptlit.training.gradients import NonFiniteGuard, clip_gradients
from gptlit.training.lightning_compat import attached_trainer, configure_compiler, is_log_step, log_numbers
from gptlit.training.optimizer import (
    OPTIMIZERS,
    OptimizerName,
    Schedule,
    ScheduleName,
    update_param_groups,
)
from gptlit.training.resume import check_same_model, prepare_fit, uses_fused_adamw
from gptlit.training.supported import check_supported
from gptlit.training.tensorboard import log_confusion
from gptlit.training.trainable import Trainable, check_lora, check_trainable, exclude_base, freeze


class GPTModule(pl.LightningModule):
    """Trains a GPTModel on (inputs, targets), int64 (B, T) each.

    Logged every `trainer.log_every_n_steps` optimizer steps: train/loss (mean over the targets of the global batch),
    train/grad_norm (before clipping), train/tokens (targets so far, all devices), lr, and train/skipped_steps once
    there is one. After each validation: val/loss, val/perplexity, val/bits_per_byte. A classifier has train/accuracy
    and val/accuracy instead, and a confusion matrix in TensorBoard's text tab.

    A step with a non-finite gradient leaves weights and optimizer state unchanged and is counted. Dropout is seeded for
    each micro-batch from the run's seed and the step, so that a resumed run equals an uninterrupted one.

    Args:
        config: The architecture.
        optimizer: "adamw", or "muon" for the matrices inside the blocks and AdamW for the rest.
        lr: Learning rate at the end of the warm-up.
        schedule: "cosine" approaches `min_lr` at the last step, "constant" stays at `lr`, "wsd" (warm-up, stable,
            decay) stays there but for a linear decay towards `min_lr` over the last fifth of the steps after the
            warm-up.
        initial_lr: Learning rate of the first step of a warm-up.
        min_lr: Learning rate that "cosine" and "wsd" approach.
        warmup_steps: Optimizer steps from `initial_lr` to `lr`.
        weight_decay: Weight decay of matrices.
        decay_all: Apply weight decay to biases and norms too.
        beta1: AdamW's decay of the gradient's running mean.
        beta2: AdamW's decay of the running mean of its square.
        compile: Compile the blocks with torch.compile (needs a C++ compiler on a CPU). Checkpoints stay the same.
        residual_in_fp32: Keep the residual stream in float32 under bf16-mixed precision; false: in bf16, which is
            faster. With FSDP2, which gathers the embedding in bf16, it is bf16 in any case.
        activation_checkpointing: Save only the input of each block and recompute the rest in backward: much less memory
            for 20 to 30% more time.
        init_from: Load initial weights only, from a checkpoint or a run's folder, a Hugging Face folder or `hf:NAME`,
            the book's `.pth`, nanoGPT's `ckpt.pt`. A classifier keeps a head for the labels of the data only.
        trainable: What is trained; the rest is frozen: "all", "head", "last_block" (the last block, the final norm and
            the head), or a number of last blocks with the final norm and the head.
        lora: With a rank, freeze the weights of `init_from` and train low-rank adapters.

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
        residual_in_fp32: bool = True,
        activation_checkpointing: bool = False,
        init_from: str | None = None,
        trainable: Trainable = "all",
        lora: LoRAConfig = LoRAConfig(),  # noqa: B008  (frozen)
    ) -> None:
        arguments = {key: value for key, value in locals().items() if key not in ("self", "__class__", "init_from")}
        super().__init__()
        _check(arguments)
        self.config = GPTConfig(**config) if isinstance(config, dict) else config  # a dict: from a checkpoint
        self.trainable = trainable
        self.lora = LoRAConfig(**lora) if isinstance(lora, dict) else lora
        check_lora(self.lora, self.config, init_from)
        check_trainable(trainable, self.config, self.lora)
        self.schedule = Schedule(schedule, initial_lr, lr, min_lr, warmup_steps)
        self.optimizer_name: OptimizerName = optimizer
        self._group_values: Any = {"weight_decay": weight_decay, "decay_all": decay_all, "betas": (beta1, beta2)}
        self.compile_model = compile
        tuning: Any = {"coordinate_descent_tuning": True}  # of the kernel on a GPU
        self._softmax = torch.compile(softmax_, dynamic=False, options=tuning) if compile else chunked_softmax_
        self.residual_in_fp32 = residual_in_fp32
        self.activation_checkpointing = activation_checkpointing
        self.init_from = init_from
        self.guard = NonFiniteGuard()
        self.tokens = 0  # of the optimizer steps since the run began, all devices
        self._step_targets: int | None = None
        self._losses: list[Tensor] = []  # of the micro-batches of one optimizer step, on the device
        self._step_tokens = 0  # of the same
        arguments |= {"config": asdict(self.config), "lora": asdict(self.lora)}  # plain values: see `weights_only`
        self.save_hyperparameters(arguments)

    @override
    def setup(self, stage: str) -> None:
        check_supported(self.trainer)

    @override
    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        trainer = attached_trainer(self)
        device = torch.device("cpu") if trainer is None else trainer.strategy.root_device
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, TokenDataModule):
            self.config = replace(self.config, n_classes=len(data.labels))
            self.hparams["config"] = asdict(self.config)
            if data.sources.kind is not None:
                self._softmax = chunked_softmax_  # a compiled one would be compiled again for each length of a batch
        self.model = _new_model(self.config, self.lora, trainer, device)
        if self.init_from is not None:
            _load_weights(self, self.init_from, data)
        freeze(self.model, self.trainable)
        self.model.residual_in_fp32 = self.residual_in_fp32
        _set_up_blocks(self.model, self.activation_checkpointing, self.compile_model, device)

    @override
    def forward(self, token_ids: Tensor) -> Tensor:
        return self.model(token_ids)  # type: ignore[no-any-return]

    @override
    def on_train_start(self) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        update_param_groups(optimizer, **self._group_values)
        self._run_seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        self.guard.reset(self.device)
        self._losses, self._step_tokens = [], 0  # a previous fit may have ended inside an accumulation window
        self._accuracy = MulticlassAccuracy(self.config.n_classes, average="micro", validate_args=False).to(self.device)
        steps = self.trainer.max_steps
        self._max_steps = steps if steps > 0 else int(self.trainer.estimated_stepping_batches)

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        if self.config.drop_rate:
            torch.manual_seed(_seed(self._run_seed, self.global_step, len(self._losses), self.global_rank))
        if self.is_between_steps:
            self._step_targets = self.targets_in_step()
        if self._step_targets is None:
            loss = self._loss(inputs, targets, "mean")
            self._step_tokens += inputs.numel() * self.trainer.world_size
        else:  # the mean over the whole step: Lightning divides by the accumulation, DDP and FSDP by the devices
            micro_batches = self.trainer.accumulate_grad_batches * self.trainer.world_size
            loss = self._loss(inputs, targets, "sum") * (micro_batches / self._step_targets)
            self._step_tokens = self._step_targets
        self._losses.append(loss.detach())
        return loss

    def targets_in_step(self) -> int | None:
        """Return the targets of all micro-batches of this step and all devices; None: each has the same number."""
        datamodule = getattr(self.trainer, "datamodule", None)
        return datamodule.targets_in_step(self.global_step) if isinstance(datamodule, TokenDataModule) else None

    def _loss(self, inputs: Tensor, targets: Tensor, reduction: Literal["mean", "sum"]) -> Tensor:
        hidden = self.model.hidden(inputs)  # (B, T, C); before the head's weight is read: it unshards that too
        if not self.config.n_classes:
            return linear_cross_entropy(hidden, merged_weight(self.model.out_head), targets, reduction, self._softmax)
        hidden, labels = at_labels(hidden, targets)  # (B, 1, C), (B, 1)
        logits = self.model.out_head(hidden)  # (B, 1, n_classes)
        metric = self._accuracy if self.training else self._confusion
        metric.update(logits.detach().argmax(-1), labels)
        return next_token_loss(logits, labels, reduction)

    @property
    def is_between_steps(self) -> bool:
        """Whether the next micro-batch is the first one of an optimizer step."""
        return not self._losses

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:  # a function of the step alone: nothing of it is in a checkpoint
            group["lr"] = self.schedule.at(self.global_step, self._max_steps)

    @override
    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        self._grad_norm = clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if self.trainer.precision != "16-mixed":
            self.guard.check(optimizer, self._grad_norm)

    @override
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()  # right after the step: Lightning would keep gradients beside the next activations
        self.tokens += self._step_tokens
        if is_log_step(self.trainer, self.global_step + 1):
            self._log_step(optimizer.param_groups[0]["lr"])
        if self.config.n_classes:
            self._accuracy.reset()
        self._losses, self._step_tokens = [], 0

    def _log_step(self, lr: float) -> None:
        self.log("train/loss", torch.stack(self._losses).mean(), sync_dist=True)
        self.log("train/grad_norm", self._grad_norm)
        if self.config.n_classes:
            self.log("train/accuracy", self._accuracy.compute())
        log_numbers(self, {"train/tokens": self.tokens, "lr": lr})
        if skipped := self.guard.total:  # synchronizes
            log_numbers(self, {"train/skipped_steps": skipped})

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        trainer = attached_trainer(self)
        optimizer = OPTIMIZERS[self.optimizer_name].build(self.model, self.schedule.peak, uses_fused_adamw(trainer))
        update_param_groups(optimizer, **self._group_values)
        return optimizer

    @override
    def on_validation_epoch_start(self) -> None:
        self._mean_loss = MeanMetric().to(self.device)  # a new one: an interrupted validation leaves nothing behind
        self._confusion = MulticlassConfusionMatrix(
            self.config.n_classes, ignore_index=NO_TARGET, validate_args=False
        ).to(self.device)

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        inputs, targets = batch
        n_targets = (targets >= 0).sum()  # without padding
        self._mean_loss.update(self._loss(inputs, targets, "sum") / n_targets.clamp(min=1), weight=n_targets)

    @override
    def on_validation_epoch_end(self) -> None:
        name = "test" if self.trainer.testing else "val"
        loss = self._mean_loss.compute()  # over all devices
        self.log(f"{name}/loss", loss)
        if self.config.n_classes:
            matrix = self._confusion.compute()
            self.log(f"{name}/accuracy", matrix.trace() / matrix.sum())
            log_confusion(self.trainer, name, matrix)
            return
        self.log(f"{name}/perplexity", loss.exp())
        datamodule = getattr(self.trainer, "datamodule", None)
        ratios = datamodule.run_data.bytes_per_token() if isinstance(datamodule, TokenDataModule) else {}
        if name in ratios:
            self.log(f"{name}/bits_per_byte", loss / math.log(2) / ratios[name])

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokens"] = self.tokens
        checkpoint["skipped_steps"] = self.guard.total
        if isinstance(getattr(self.trainer, "datamodule", None), TokenDataModule):  # whose state says where it is
            del checkpoint["loops"]  # Lightning's counters, of one device's micro-batches

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trainer = attached_trainer(self)
        is_fit = trainer is not None and trainer.state.fn == "fit"
        check_same_model(self.hparams, checkpoint, is_fit)
        if trainer is not None and is_fit:
            prepare_fit(trainer, checkpoint)
        self.tokens, self.guard.before = checkpoint.get("tokens", 0), checkpoint.get("skipped_steps", 0)


def _new_model(config: GPTConfig, lora: LoRAConfig, trainer: pl.Trainer | None, device: torch.device) -> GPTModel:
    if trainer is not None and isinstance(trainer.strategy, FSDP2Strategy):
        return sharded_model(config, lora, trainer.strategy.sharding_mesh(), device, str(trainer.precision))
    with torch.device("cpu"):  # a seed gives the same weights on any device
        return build_model(config, lora)


def _load_weights(module: GPTModule, path: str, data: Any) -> None:
    """Load initial weights; without a head that is for other labels than the data's, and as the base of adapters."""
    source = read_weights(path)
    if (tokenizer := getattr(data, "tokenizer", None)) is not None:
        check_tokenizer(source, tokenizer)
    base = adapt_head(source, module.config.n_classes, getattr(data, "labels", []))
    copy_weights(module.model, base)
    if module.lora.rank:
        exclude_base(module, module.model, base)
        path = path if path.startswith(HUB) else str(source.path.resolve())
        module.hparams.update(init_from=path, base_fingerprint=source.fingerprint)


def _set_up_blocks(model: GPTModel, activation_checkpointing: bool, compile: bool, device: torch.device) -> None:
    if compile:
        check_compiler(device)
        configure_compiler(device)
    for block in model.trf_blocks:
        assert isinstance(block, TransformerBlock)
        block.activation_checkpointing = activation_checkpointing
        if compile:
            block.compile()  # in place: the keys of the state dict stay as they are


def _seed(*values: int) -> int:
    text = " ".join(map(str, values))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _check(arguments: dict[str, Any]) -> None:
    for key in ("lr", "initial_lr", "min_lr", "weight_decay"):
        if not 0 <= arguments[key] < math.inf:
            raise ValueError(f"model.{key} must be a number of at least 0, got {arguments[key]}")
    for key in ("beta1", "beta2"):
        if not 0 <= arguments[key] < 1:
            raise ValueError(f"model.{key} must be at least 0 and below 1, got {arguments[key]}")
    for key, known in {"schedule": get_args(ScheduleName), "optimizer": tuple(OPTIMIZERS)}.items():
        if arguments[key] not in known:
            raise ValueError(f"model.{key} must be one of {', '.join(known)}, got {arguments[key]!r}")
    if arguments["warmup_steps"] < 0:
        raise ValueError(f"model.warmup_steps must be at least 0, got {arguments['warmup_steps']}")
