"""A sweep over `fit` with Optuna: each trial is a run of its own.

    python examples/sweep.py --name sweep --trials 20 --config configs/quickstart.yaml --trainer.max_steps 200

Options that are not listed by --help go to `fit`, the same for all trials. Runs are stored in runs/<name>/trial-<n>,
the study in runs/<name>/study.db: the same command continues an interrupted sweep.
"""

import argparse
import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from gptlit.commands.plot import read_run
from gptlit.errors import InputError, fail, needs, note

if TYPE_CHECKING:
    import optuna


def search_space(trial: "optuna.Trial") -> dict[str, object]:
    """Return the settings to try, by their names in `fit`. This function is the one to edit."""
    return {
        "model.optimizer": trial.suggest_categorical("model.optimizer", ["adamw", "muon"]),
        "model.lr": trial.suggest_float("model.lr", 3e-4, 3e-2, log=True),
        "model.weight_decay": trial.suggest_float("model.weight_decay", 0.0, 0.3),
    }


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description="Search settings of `fit` with Optuna.", allow_abbrev=False)
    found.error = partial(fail, status=2)
    found.add_argument("--name", default="sweep", help="folder below runs/")
    found.add_argument("--trials", type=int, default=20, help="runs in all, those of earlier calls included")
    return found


def flags(settings: dict[str, object]) -> list[str]:
    return [f"--{key}={value}" for key, value in settings.items()]


def train(trial: "optuna.Trial", folder: Path, fit_args: list[str]) -> float | None:
    """Train with the trial's settings; return the last val/loss, None if the run failed.

    Raises:
        InputError: There is no validation.
    """
    run = f"trial-{trial.number}"
    own = flags({**search_space(trial), "run.name": run, "trainer.default_root_dir": folder})
    status = subprocess.run([sys.executable, "-m", "gptlit", "fit", *fit_args, *own]).returncode
    if status in (2, 130, 143):  # wrong arguments, which `fit` has named; interrupted
        raise SystemExit(status)
    if status:
        return None
    curves = read_run(str(folder / run)).curves
    if "val" not in curves:
        raise InputError("there is no val/loss to compare: raise data.val_fraction")
    loss = float(curves["val"].values[-1])
    return loss if math.isfinite(loss) else None


def show(study: "optuna.Study", folder: Path) -> None:
    """Print the five best trials, and the flags of the best one."""
    complete = [trial for trial in study.trials if trial.value is not None]
    if not complete:
        raise InputError(f"none of the {len(study.trials)} trials in {folder} has come to its end: see their messages")
    best = sorted(complete, key=lambda trial: trial.value)[:5]
    table = Table("run", "val/loss", *best[0].params, box=None)
    for trial in best:
        values = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in trial.params.values())
        table.add_row(str(folder / f"trial-{trial.number}"), f"{trial.value:.4f}", *values)
    Console(width=None if Console().is_terminal else 160).print(table)
    print("best:", *flags(best[0].params))


def main() -> None:
    args, fit_args = parser().parse_known_args()
    with needs("optuna", "a sweep"):
        import optuna
    if args.trials < 1:
        fail(f"--trials must be a positive integer, got {args.trials}", status=2)
    if not re.fullmatch(r"[\w-]+", args.name):
        fail(f"--name must consist of letters, digits, - and _, got {args.name!r}", status=2)
    folder = Path("runs") / args.name
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(storage=f"sqlite:///{folder}/study.db", study_name=args.name, load_if_exists=True)
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))  # a continued study repeats no draw
    complete, failed = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED
    for number in range(len(study.get_trials(states=(complete, failed))), args.trials):
        note(f"trial {number + 1} of {args.trials}")
        trial = study.ask()
        loss = train(trial, folder, fit_args)
        study.tell(trial, loss, failed if loss is None else complete)
    show(study, folder)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
