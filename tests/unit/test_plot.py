"""`gptlit plot`."""

import math
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from gptlit.commands.main import main
from gptlit.commands.plot import Curve, differences, draw, read_run, smooth


def event_file(folder: Path) -> tuple[SummaryWriter, int]:
    """Open an event file; return the writer and the second in which its fit began."""
    writer = SummaryWriter(str(folder))
    return writer, max(int(path.name.split(".")[3]) for path in folder.glob("events.*"))


@pytest.fixture
def runs() -> list[str]:
    """Two runs, as training leaves them."""
    for version, lr in enumerate((1e-3, 2e-3)):
        folder = Path(f"runs/a/version_{version}")
        writer, began = event_file(folder)
        for step in range(1, 41):
            losses = {"train": 5 + 5 * math.exp(-step / 8) - version / 10}
            if step % 10 == 0:
                losses["val"] = 5.2 + abs(step - 30) / 50 - version / 10
            for name, loss in losses.items():
                writer.add_scalar(f"{name}/loss", loss, step, walltime=began + step * 2.5)
            writer.add_scalar("train/tokens", step * 1000, step)
        writer.close()
        config = {"model": {"lr": lr, "config": {"emb_dim": 32}}, "run": {"name": f"a{version}"}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return ["runs/a/version_0", "runs/a/version_1"]


def test_a_picture_is_written_and_best_losses_and_differences_printed(
    runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path(runs[0], "config_1.yaml").write_text("{model: {lr: 1, config: {emb_dim: 32}}, run: {sample_prompt: '[b]'}}")
    main(["plot", *runs, "--out", "curves.png"])
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "5.2000" in out  # the best of the first run, at step 30
    assert "5.1000" in out
    assert "model.lr" in out
    assert "emb_dim" not in out
    assert "[b]" in out


def test_the_picture_shows_curves_and_best_points(runs: list[str]) -> None:
    tokens, seconds = draw([read_run(run) for run in runs]).axes
    assert [len(part.lines) for part in (tokens, seconds)] == [8, 8]  # raw, smoothed, val, best: of two runs
    assert tokens.lines[3].get_xydata()[0] == pytest.approx([0.03, 5.2])  # million tokens
    assert seconds.lines[3].get_xydata()[0] == pytest.approx([75 / 60, 5.2])
    labels = [text.get_text() for text in tokens.get_legend().get_texts()]
    assert labels[1::2] == ["a/version_0, val, best 5.200", "a/version_1, val, best 5.100"]


def test_the_newest_version_is_taken(runs: list[str]) -> None:
    assert read_run("runs/a").folder == Path("runs/a/version_1")
    assert differences([read_run(run) for run in runs]) == {"model.lr": [1e-3, 2e-3]}


def test_smoothing_is_bias_corrected_and_skips_nan() -> None:
    assert smooth(np.array([3.0, 3.0, math.nan, 3.0] * 20)) == pytest.approx([3.0] * 80)
    values = np.linspace(10, 0, 50)  # half the weight on what came before
    assert smooth(values)[1] == pytest.approx((0.5 * values[0] + values[1]) / 1.5)


@pytest.mark.parametrize(
    ("words", "args"),
    [
        ("must end in .png, .svg or .pdf", ["runs/a", "--out", "curves.txt"]),
        ("nowhere/curves.png", ["runs/a", "--out", "nowhere/curves.png"]),
        ("nowhere has no event files", ["nowhere", "--out", "curves.png"]),
        ("has no train/loss and no val/loss yet", ["runs/empty", "--out", "curves.png"]),
    ],
)
def test_bad_input_is_one_line(
    runs: list[str], words: str, args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    event_file(Path("runs/empty"))[0].close()
    with pytest.raises(SystemExit) as exit_:
        main(["plot", *args])
    assert exit_.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert not Path("curves.png").exists()


def test_a_loss_that_is_nan_is_not_the_best() -> None:
    assert Curve(*map(np.array, ([1, 2, 3], [1, 2, 3], [1, 2, 3], [math.nan, 5.2, 5.4]))).best == 1


def test_steps_after_the_last_log_point_have_their_tokens(runs: list[str]) -> None:
    writer, began = event_file(Path(runs[0]))
    writer.add_scalar("val/loss", 4.0, 60, walltime=began + 2.5)
    writer.close()
    curve = read_run(runs[0]).curves["val"]
    assert (curve.steps[-1], curve.tokens[-1]) == (60, 60000)


def test_the_pause_before_a_resume_is_left_out(runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    last = read_run(runs[0]).curves["train"].seconds[-1]
    resumed = time.time() + 7200
    monkeypatch.setattr(time, "time", lambda: resumed)
    writer, began = event_file(Path(runs[0]))
    writer.add_scalar("train/loss", 4.0, 41, walltime=began + 2.5)
    writer.add_scalar("train/tokens", 41000, 41)
    writer.close()
    curve = read_run(runs[0]).curves["train"]
    assert (curve.steps[-1], curve.tokens[-1]) == (41, 41000)
    assert curve.seconds[-1] == pytest.approx(last + 2.5)
