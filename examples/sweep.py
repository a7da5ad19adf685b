"""A sweep over `fit` with Optuna: each trial is a run of its own.

    python examples/sweep.py --name sweep --trials 20 --config configs/quickstart.yaml --trainer.max_steps 200

Options that are not listed by --help go to `fit`, the same for all trials. Runs are stored in runs/<name>/trial-<n>,
the study in runs/<name>/study.db: the same command continues an interrupted sweep.
"""

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from gptlit.commands.plot import read_run
from gptlit.errors import InputError, fail, note

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


def objective(trial: "optuna.Trial", folder: Path, fit_args: list[str]) -> float:
    """Train with the trial's settings; return the last val/loss.

    Raises:
        InputError: `fit` refuses its arguments, so that all other trials would end in the same way.
        TrialPruned: The run failed, for example because its gradients were not finite.
    """
    import optuna

    run = f"trial-{trial.number}"
    own = flags({**search_space(trial), "run.name": run, "trainer.default_root_dir": folder})
    status = subprocess.run([sys.executable, "-m", "gptlit", "fit", *fit_args, *own]).returncode
    if status == 2:
        raise InputError("`fit` does not take these arguments, see above: no trial was made")
    if status in (130, 143):
        raise KeyboardInterrupt
    if status:
        raise optuna.TrialPruned(f"fit ended with status {status}")
    curves = read_run(str(folder / run)).curves
    if "val" not in curves:
        raise InputError("there is no val/loss to compare: lower run.val_every_n_steps, or raise data.val_fraction")
    return float(curves["val"].values[-1])


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
    try:
        import optuna
    except ImportError as error:
        raise InputError("a sweep needs optuna: pip install -c constraints.txt -e '.[recipes]'") from error
    if args.trials < 1:
        fail(f"--trials must be a positive integer, got {args.trials}", status=2)
    if Path(args.name).name != args.name:
        fail(f"--name must be a plain folder name, got {args.name!r}", status=2)
    folder = Path("runs") / args.name
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(storage=f"sqlite:///{folder}/study.db", study_name=args.name, load_if_exists=True)
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))  # a continued study repeats no draw
    done = sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in study.trials)
    for number in range(done, args.trials):
        note(f"trial {number + 1} of {args.trials}")
        study.optimize(lambda trial: objective(trial, folder, fit_args), n_trials=1)
    show(study, folder)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
