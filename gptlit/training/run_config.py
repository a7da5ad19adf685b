"""The `run` group of a configuration, and what is saved of it."""

import math
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain, count
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from typing_extensions import override

from gptlit import __version__


@dataclass
class RunConfig:
    """Where a run is stored and how often it validates and saves. Steps are optimizer steps.

    Args:
        name: Runs are stored in <trainer.default_root_dir>/<name>/version_<n>.
        val_every_n_steps: Steps from one validation to the next.
        save_every_n_steps: Steps from one checkpoint to the next; the end of a fit is saved in any case.
        keep_last: Newest checkpoints to keep; -1 keeps all.
        keep_best: Keep the checkpoint with the lowest val/loss too, and let best.ckpt point to it.
        async_save: Write checkpoints in the background, from a copy in memory; None: only on a GPU, as on a CPU the
            writer slows down training.
        max_nonfinite_steps: Consecutive steps with a non-finite gradient that end the run.
        sample_prompt: Text to continue after each validation; empty: no sample.
        peak_tflops: Peak of one device, for perf/mfu; None: from the datasheet of a known GPU.
    """

    name: str = "gpt"
    val_every_n_steps: int = 100
    save_every_n_steps: int = 100
    keep_last: int = 3
    keep_best: bool = True
    async_save: bool | None = None
    max_nonfinite_steps: int = 5
    sample_prompt: str = "The"
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        is_plain = Path(self.name).name == self.name and not self.name.startswith(".")
        if not self.name or not is_plain or "$" in self.name:  # Lightning's loggers expand variables
            raise ValueError(f"run.name must be a plain folder name without $, got {self.name!r}")
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise ValueError(f"run.peak_tflops must be a positive number, got {self.peak_tflops}")
        for key in ("val_every_n_steps", "save_every_n_steps", "max_nonfinite_steps"):
            if getattr(self, key) < 1:
                raise ValueError(f"run.{key} must be a positive integer, got {getattr(self, key)}")
        if self.keep_last < 1 and self.keep_last != -1:
            raise ValueError(f"run.keep_last must be a positive integer, or -1 to keep all, got {self.keep_last}")


class SaveRunConfig(SaveConfigCallback):
    """Writes the complete configuration to the run's folder (config.yaml, then config_1.yaml at the first resume), and
    the configuration, package versions and git revision to each checkpoint.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, run: Path) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.run = run
        self._origin: dict[str, Any] | None = None

    @override
    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.run.mkdir(parents=True, exist_ok=True)
        names = chain(["config.yaml"], (f"config_{n}.yaml" for n in count(1)))
        path = next(path for name in names if not (path := self.run / name).exists())
        self.parser.save(self.config, path, skip_unset=False, overwrite=False, multifile=False)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._origin is None:
            packages = ("torch", "lightning", "tiktoken", "numpy")
            versions = {"gptlit": __version__, "python": platform.python_version()}
            versions |= {package: version(package) for package in packages}
            config = self.parser.dump(self.config, skip_unset=False)
            self._origin = {"config": config, "versions": versions, "revision": _revision()}
        checkpoint["origin"] = self._origin


def _revision() -> str | None:
    """Return the git revision of the code, with the suffix "-dirty" if it was modified; None if git does not track it,
    as in an installed package.
    """
    path = Path(__file__)
    tracked = ["git", "ls-files", "--error-unmatch", path.name]  # else the repository around it is another project's
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        for command in (tracked, describe):
            done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
