"""The same run on one device, several, in shards, on two nodes, and moved from one to another; and what each holds."""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE

from rich.console import Console
from rich.table import Table

from benchmarks.contenders import machine
from benchmarks.faults import ROOT, write_words

TRAIN = [
    *("fit", "--data.source=words.txt", "--data.batch_size=8", "--data.micro_batch_size=1", "--data.val_fraction=0.05"),
    *("--model.config.context_length=64", "--model.config.emb_dim=64", "--model.config.n_heads=4"),
    *("--model.config.n_layers=3", "--model.config.drop_rate=0", "--model.config.init=gpt2"),
    *(
        "--model.lr=1e-3",
        "--model.schedule=constant",
        "--trainer.accelerator=cpu",
        "--trainer.precision=32-true",
        "--trainer.log_every_n_steps=1",
    ),
    *("--trainer.gradient_clip_val=1", "--run.val_every_n_steps=5", "--run.sample_prompt="),
]
DEVICES = {
    "1 device": ["--trainer.devices=1"],
    "DDP x 2": ["--trainer.devices=2", "--trainer.strategy=ddp"],
    "DDP x 4": ["--trainer.devices=4", "--trainer.strategy=ddp"],
    "FSDP2 x 2": ["--trainer.devices=2", "--trainer.strategy=fsdp2"],
    "FSDP2 x 4": ["--trainer.devices=4", "--trainer.strategy=fsdp2"],
}
NODES = "2 nodes x 1, DDP"
MOVES = [
    ("DDP x 2", "1 device"),
    ("DDP x 2", "DDP x 4"),
    ("DDP x 2", "FSDP2 x 2"),
    ("FSDP2 x 2", "DDP x 2"),
    ("FSDP2 x 2", "1 device"),
    ("1 device", "FSDP2 x 4"),
]


def run(steps: int = 50, out: str = "devices.json") -> None:
    """Train the same steps on several kinds of devices; print how far their losses are from those of one device.

    Args:
        steps: Of each run; half of them before a move.
        out: JSON file for the figures.
    """
    with tempfile.TemporaryDirectory() as folder:
        bench = Devices(Path(folder), steps)
        for name, flags in DEVICES.items():
            bench.train(name, flags, steps)
        bench.train_on_two_nodes(NODES)
        for before, after in MOVES:
            name = f"{before} -> {after}"
            bench.train(name, DEVICES[before], steps // 2)
            bench.train(name, [*DEVICES[after], "--ckpt_path=last"], steps)
        table = Table("devices", "train/loss", "val/loss", "largest difference, train", "val")
        rows = {name: bench.compare(name) for name in bench.curves}
    for name, (train, val, train_off, val_off) in rows.items():
        table.add_row(name, f"{train:.6f}", f"{val:.6f}", f"{train_off:.1e}", f"{val_off:.1e}")
    Console().print(table)
    Path(out).write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


class Devices:
    """Runs of the same steps, in a folder."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.curves: dict[str, tuple[dict[int, float], dict[int, float]]] = {}
        write_words(folder / "words.txt")

    def command(self, name: str, flags: Sequence[str], steps: int) -> list[str]:
        """Return the words after `python`."""
        path = name.replace(" ", "").replace("->", "-")
        return [str(ROOT / "train.py"), *TRAIN, *flags, f"--run.name={path}", f"--trainer.max_steps={steps}"]

    def train(self, name: str, flags: Sequence[str], steps: int) -> None:
        """Train, and keep the curves."""
        command = [sys.executable, *self.command(name, flags, steps)]
        subprocess.run(command, cwd=self.folder, env=ENV, check=True, capture_output=True)
        self._keep(name)

    def train_on_two_nodes(self, name: str) -> None:
        """Train in two processes that each believe to be a machine of their own."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        nodes = []
        for node, address in enumerate(("127.0.0.1", "127.0.0.2")):
            words = ["--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1", f"--local-addr={address}"]
            words += ["--master-addr=127.0.0.1", f"--master-port={port}"]
            command = [sys.executable, "-m", "torch.distributed.run", *words, *self.command(name, [], self.steps)]
            environment = {**ENV, "GLOO_SOCKET_IFNAME": "lo"}
            nodes.append(
                subprocess.Popen(command, cwd=self.folder, env=environment, stdout=subprocess.DEVNULL, stderr=PIPE)
            )
        said = [node.communicate()[1].decode() for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], said
        self._keep(name)

    def _keep(self, name: str) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        path = name.replace(" ", "").replace("->", "-")
        events = EventAccumulator(str(self.folder / "runs" / path / "version_0"), size_guidance={"scalars": 0})
        events.Reload()
        curves = [{event.step: event.value for event in events.Scalars(tag)} for tag in ("train/loss", "val/loss")]
        self.curves[name] = curves[0], curves[1]

    def compare(self, name: str) -> tuple[float, float, float, float]:
        """Return the last losses, and the largest differences to one device over all steps."""
        off = []
        for ours, one in zip(self.curves[name], self.curves["1 device"], strict=True):
            assert ours.keys() == one.keys(), f"{name}: steps {ours.keys() ^ one.keys()} are missing"
            off.append(max(abs(ours[step] - one[step]) for step in one))
        train, val = (curve[self.steps] for curve in self.curves[name])
        return train, val, off[0], off[1]


ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
# Prints the most memory that each process has held: once the data is open, and at the end.
PEAK = """
import os, resource
from gptlit.training import cli as training
from gptlit.training.module import GPTModule

def say(what):
    os.write(1, f"{what} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}\\n".encode())

start = GPTModule.configure_model
def begin(self):
    if not hasattr(self, "model"):
        say("before")
    start(self)
GPTModule.configure_model = begin
training.keep_freed_memory = lambda: None  # what is needed, not what is kept for later
training.main()
say("peak")
"""


def memory(steps: int = 2, rounds: int = 2, out: str = "memory.json") -> None:
    """Print the peak memory a process of GPT-2 small, DDP and FSDP2 on two devices, 2 x 1024 tokens on each.

    Args:
        steps: Of each run.
        rounds: Runs of each kind; the median is shown.
        out: JSON file for the figures.
    """
    results: dict[str, list[float]] = {}
    flags = [f"--trainer.max_steps={steps}", "--data.source=words.txt", "--data.batch_size=4", "--run.sample_prompt="]
    flags += ["--data.val_fraction=0", "--model.config.drop_rate=0", "--trainer.accelerator=cpu"]
    flags += ["--model.config.tie_weights=true", "--trainer.enable_checkpointing=false", "--trainer.devices=2"]
    with tempfile.TemporaryDirectory() as folder:
        write_words(Path(folder, "words.txt"))
        script = Path(folder, "peak.py")
        script.write_text(PEAK)
        for _ in range(rounds):
            for strategy in ("ddp", "fsdp2"):
                for again in ("false", "true"):
                    options = [f"--trainer.strategy={strategy}", f"--model.activation_checkpointing={again}"]
                    command = [sys.executable, str(script), "fit", *flags, *options]
                    output = subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True, check=True)
                    found = [line.split() for line in output.stdout.splitlines()]
                    before = [int(words[1]) for words in found if words[:1] == ["before"]]
                    peaks = [int(words[1]) for words in found if words[:1] == ["peak"]]
                    name = f"{strategy}, {'blocks computed again' if again == 'true' else 'all activations'}"
                    results.setdefault(name, []).append((max(peaks) - min(before)) * 1024 / 1e9)
    table = Table("strategy, activations", "peak a process above its start, GB")
    for name, values in results.items():
        table.add_row(name, f"{statistics.median(values):.2f}")
    Console().print(table)
    Path(out).write_text(json.dumps({"machine": machine(), "GB": results}, indent=1) + "\n")
