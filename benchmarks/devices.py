"""The same run on one and several devices, DDP and FSDP2, two nodes, and resumed on others: losses and peak memory."""

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

from benchmarks.contenders import machine, read_curve
from benchmarks.faults import ROOT, write_words

TRAIN = """
fit --data.source=words.txt --data.batch_size=8 --data.micro_batch_size=1 --data.val_fraction=0.05
--model.config.context_length=64 --model.config.emb_dim=64 --model.config.n_heads=4 --model.config.n_layers=3
--model.config.drop_rate=0 --model.config.init=gpt2 --model.lr=1e-3 --model.schedule=constant
--trainer.accelerator=cpu --trainer.precision=32-true --trainer.log_every_n_steps=1 --trainer.gradient_clip_val=1
--run.val_every_n_steps=5 --run.sample_prompt=
""".split()
DEVICES = {
    "1 device": ["--trainer.devices=1"],
    "DDP x 2": ["--trainer.devices=2", "--trainer.strategy=ddp"],
    "DDP x 4": ["--trainer.devices=4", "--trainer.strategy=ddp"],
    "FSDP2 x 2": ["--trainer.devices=2", "--trainer.strategy=fsdp2"],
    "FSDP2 x 4": ["--trainer.devices=4", "--trainer.strategy=fsdp2"],
}
NODES = "2 nodes x 1, DDP"
RESUMES = [
    ("DDP x 2", "1 device"),
    ("DDP x 2", "DDP x 4"),
    ("DDP x 2", "FSDP2 x 2"),
    ("FSDP2 x 2", "DDP x 2"),
    ("FSDP2 x 2", "1 device"),
    ("1 device", "FSDP2 x 4"),
]


def run(steps: int = 50, out: str = "devices.json") -> None:
    """Train the same steps on different devices; print the differences of their losses from those of one device.

    Args:
        steps: Steps of each run; half of them before the resume on other devices.
        out: JSON file for the results.
    """
    with tempfile.TemporaryDirectory() as folder:
        bench = Devices(Path(folder), steps)
        for name, flags in DEVICES.items():
            bench.train(name, flags, steps)
        bench.train_on_two_nodes(NODES)
        for before, after in RESUMES:
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
    """Runs of the same steps in a folder."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.curves: dict[str, tuple[dict[int, float], dict[int, float]]] = {}
        write_words(folder / "words.txt")

    def command(self, name: str, flags: Sequence[str], steps: int) -> list[str]:
        """Return the arguments of `python`."""
        path = name.replace(" ", "").replace("->", "-")
        return [str(ROOT / "train.py"), *TRAIN, *flags, f"--run.name={path}", f"--trainer.max_steps={steps}"]

    def train(self, name: str, flags: Sequence[str], steps: int) -> None:
        """Train and read the curves."""
        command = [sys.executable, *self.command(name, flags, steps)]
        subprocess.run(command, cwd=self.folder, env=ENV, check=True, capture_output=True)
        self._read_curves(name)

    def train_on_two_nodes(self, name: str) -> None:
        """Train on two torchrun agents with different addresses, as on two nodes."""
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
        errors = [node.communicate()[1].decode() for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], errors
        self._read_curves(name)

    def _read_curves(self, name: str) -> None:
        run = self.folder / "runs" / name.replace(" ", "").replace("->", "-") / "version_0"
        self.curves[name] = read_curve(run, "train/loss"), read_curve(run, "val/loss")

    def compare(self, name: str) -> tuple[float, float, float, float]:
        """Return the last losses, and the largest differences from one device over all steps."""
        differences = []
        for ours, one in zip(self.curves[name], self.curves["1 device"], strict=True):
            assert ours.keys() == one.keys(), f"{name}: steps {ours.keys() ^ one.keys()} are missing"
            differences.append(max(abs(ours[step] - one[step]) for step in one))
        train, val = (curve[self.steps] for curve in self.curves[name])
        return train, val, differences[0], differences[1]


ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
# Prints the peak memory of each process: before the model is built, and at the end.
PEAK = """
import os, resource
from gptlit.training import cli as training
from gptlit.training.module import GPTModule

def report(what):
    os.write(1, f"{what} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}\\n".encode())

start = GPTModule.configure_model
def begin(self):
    if not hasattr(self, "model"):
        report("before")
    start(self)
GPTModule.configure_model = begin
training.keep_freed_memory = lambda: None  # the allocator would count freed memory
training.main()
report("peak")
"""


def memory(steps: int = 2, rounds: int = 2, out: str = "memory.json") -> None:
    """Print the peak memory per process of GPT-2 small with DDP and FSDP2 on two devices, 2 x 1024 tokens on each.

    Args:
        steps: Steps of each run.
        rounds: Runs of each kind; the median is printed.
        out: JSON file for the results.
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
                for checkpointing in ("false", "true"):
                    options = [f"--trainer.strategy={strategy}", f"--model.activation_checkpointing={checkpointing}"]
                    command = [sys.executable, str(script), "fit", *flags, *options]
                    output = subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True, check=True)
                    found = [line.split() for line in output.stdout.splitlines()]
                    before = [int(words[1]) for words in found if words[:1] == ["before"]]
                    peaks = [int(words[1]) for words in found if words[:1] == ["peak"]]
                    name = f"{strategy}, {'activation checkpointing' if checkpointing == 'true' else 'all activations'}"
                    results.setdefault(name, []).append((max(peaks) - min(before)) * 1024 / 1e9)
    table = Table("strategy, activations", "peak per process above its start, GB")
    for name, values in results.items():
        table.add_row(name, f"{statistics.median(values):.2f}")
    Console().print(table)
    Path(out).write_text(json.dumps({"machine": machine(), "GB": results}, indent=1) + "\n")
