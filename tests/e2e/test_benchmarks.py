"""A dry run of the GPU benchmark on a CPU."""

import json
from pathlib import Path

import pytest

from benchmarks import footprint, gpu, step


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"nanogpt": "no/such/folder"}, "no/such/folder"),
        ({"phases": ("warp",)}, "'warp'"),
        ({"budget": 1}, "--budget 1"),
    ],
)
def test_a_wrong_argument_is_one_line(tmp_path: Path, options: dict[str, object], word: str) -> None:
    with pytest.raises(SystemExit) as stop:
        gpu.run(str(tmp_path), device="cpu", **options)  # type: ignore[arg-type]
    assert word in str(stop.value)
    assert "\n" not in str(stop.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "word"),
    [({}, "--nanogpt FOLDER"), ({"nanogpt": "no/such/folder"}, "no/such/folder"), ({"peers": ("warp",)}, "'warp'")],
)
def test_a_missing_peer_is_one_line(options: dict[str, object], word: str) -> None:
    for benchmark in (step.run, footprint.run):
        with pytest.raises(SystemExit) as stop:
            benchmark(**options)
        assert word in str(stop.value)
        assert "\n" not in str(stop.value)


@pytest.mark.slow
def test_phases_write_their_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that take minutes on a CPU are left out; they differ from `step` in what they compare."""
    phases = ("ceilings", "step", "syncs")
    monkeypatch.setattr(gpu, "LIMITS", dict.fromkeys(gpu.LIMITS, 900))  # a slow machine is no failure
    gpu.run(str(tmp_path), device="cpu", budget=1800, phases=phases)
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    ends = [line for line in lines if "status" in line and "check" not in line]
    assert [line["phase"] for line in ends] == list(phases)
    assert all(line["status"] == 0 for line in ends), ends
    checks = {line["check"]: line for line in lines if "check" in line}
    assert checks
    assert all(line.get("passed") for line in checks.values()), checks
    assert [line["contender"] for line in lines if line.get("tokens/s")] == ["gptlit", "Transformers"]
