"""Randomized long version of tests/e2e/test_reliability.py: real processes with kills, signals and damaged files."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from gptlit.checkpoint.io import read_checkpoint
from gptlit.checkpoint.runs import checkpoint_path, checkpoints
from gptlit.errors import InputError

ROOT = Path(__file__).parent.parent
STEPS = 40
TRAIN = f"""
fit --model.config.context_length=32 --model.config.emb_dim=32 --model.config.n_heads=2 --model.config.n_layers=2
--model.config.drop_rate=0.1 --model.config.init=gpt2
--data.source=words.txt --data.batch_size=8 --data.micro_batch_size=2 --data.val_fraction=0.05
--trainer.accelerator=cpu --trainer.precision=32-true --trainer.max_steps={STEPS}
--run.save_every_n_steps=2 --run.val_every_n_steps=7 --run.sample_prompt= --ckpt_path=last
""".split()
# train.py with slowed-down checkpoint writes, so that many kills happen during a write.
SLOW = """
import sys, time, torch
sys.path.insert(0, sys.argv.pop(1))
save = torch.save
def slow(checkpoint, file):
    save(checkpoint, file)
    file.flush()
    time.sleep(0.15)
torch.save = slow
from gptlit.training.cli import main
main()
"""


def run(rounds: int = 100, out: str = "faults.json", seed: int = 0) -> None:
    """Train with injected faults; count runs whose weights differ, lost checkpoints, hangs and wrong exit statuses.

    Args:
        rounds: Number of SIGKILLs; of each other fault at most a fifth as many.
        out: JSON file for the results.
        seed: Seed of the random times.
    """
    rng = random.Random(seed)
    table: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), rng)
        for name, count, fault in (
            ("kill -9", rounds, bench.kill),
            ("SIGTERM to a random rank of 2", rounds // 5, bench.terminate),
            ("truncated file", rounds // 5, bench.truncate),
            ("flipped bit", rounds // 5, bench.flip),
            ("full disk", max(1, rounds // 20), bench.fill),
        ):
            table[name] = bench.many(name, count, fault)
            print(name, dict(table[name]), flush=True)  # all of it takes half an hour
    columns = ("faults", "during a write", "runs", "weights differ", "checkpoints lost", "hangs", "wrong status")
    shown = Table("fault", *columns)
    for name, counts in table.items():
        shown.add_row(name, *(str(counts[column]) for column in columns))
    Console().print(shown)
    Path(out).write_text(json.dumps(table, indent=1) + "\n")


def bitwise(steps: int = 200, kills: int = 5, seed: int = 0) -> None:
    """Print the SHA-256 of the final weights of an uninterrupted run and of one that is killed several times.

    With dropout, accumulation over four micro-batches (two on two devices), validation every 30 steps.

    Args:
        steps: Steps of the run.
        kills: Number of SIGKILLs, each at a random time after another checkpoint.
        seed: Seed of the random times.
    """
    options = [f"--trainer.max_steps={steps}", "--run.val_every_n_steps=30", "--run.save_every_n_steps=10"]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), random.Random(seed), options)
        for devices in (1, 2):
            for name, count in (("uninterrupted", 0), ("killed", kills)):
                name, seen = f"{name}-{devices}", 0
                for _ in range(count):
                    process = bench.start(name, devices)
                    bench.wait_for_a_checkpoint(name, process, seen)
                    time.sleep(bench.rng.uniform(0, 1))
                    if process.poll() is not None:
                        raise RuntimeError("the run finished before it was killed: increase --steps")
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    seen = bench.newest(name)
                assert bench.finish(bench.start(name, devices)) == 0
                path = checkpoint_path(Path(folder, "runs", name, "version_0"), steps)
                print(f"{devices} device{'s' * (devices > 1)}, {count} kills: {weights_sha256(path)}", flush=True)


def write_words(path: Path) -> None:
    """Write a text of 20,000 words."""
    words = "the a model learns from data to write text about trees and rivers in winter , slowly .".split()
    path.write_text(" ".join(random.Random(0).choices(words, k=20_000)))


def weights_sha256(path: Path) -> str:
    """Return the SHA-256 of all weights of a checkpoint."""
    digest = hashlib.sha256()
    for name, value in sorted(read_checkpoint(path)["state_dict"].items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


class Bench:
    """Runs with injected faults in a folder."""

    def __init__(self, folder: Path, rng: random.Random, options: Sequence[str] = ()) -> None:
        self.folder, self.rng, self.options = folder, rng, options
        write_words(folder / "words.txt")
        self.references: dict[int, dict[str, torch.Tensor]] = {}
        self.counts: Counter[str] = Counter()

    def many(self, name: str, count: int, fault: Callable[[str], None]) -> Counter[str]:
        """Inject a fault `count` times; return the counters."""
        self.counts = Counter()
        for _ in track(range(count), name):
            fault(name)
        return self.counts

    def start(self, name: str, devices: int = 1, limit: int | None = None) -> "subprocess.Popen[bytes]":
        """Start or resume a run."""
        command = [sys.executable, "-c", SLOW, str(ROOT), *TRAIN, *self.options, f"--run.name={name}"]
        if devices > 1:
            script = self.folder / "slow.py"  # rank 1 is started with rank 0's command
            script.write_text(SLOW.replace("sys.argv.pop(1)", repr(str(ROOT))))
            command = [sys.executable, str(script), *command[4:], f"--trainer.devices={devices}"]
            command.append("--trainer.strategy=ddp")

        def preexec() -> None:
            os.setsid()
            if limit is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        log = (self.folder / "log").open("ab")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log, preexec_fn=preexec)

    def finish(self, process: "subprocess.Popen[bytes]", seconds: float = 180) -> int | None:
        """Wait for the process to exit; on a timeout count a hang and kill it."""
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.counts["hangs"] += 1
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None

    def newest(self, name: str) -> int:
        """Return the step of the newest checkpoint, or 0."""
        found = checkpoints(self.folder / "runs" / name / "version_0")
        return int(found[-1].stem.removeprefix("step-")) if found else 0

    def wait_for_a_checkpoint(self, name: str, process: "subprocess.Popen[bytes]", after: int = 0) -> bool:
        """Wait for a checkpoint after the given step; return whether the process is alive."""
        limit = time.monotonic() + 120
        while self.newest(name) <= after and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.005)
        return process.poll() is None

    def check_loads(self, name: str, since: int) -> None:
        """Count a lost checkpoint unless one loads that is at most one save interval older than `since`."""
        for path in reversed(checkpoints(self.folder / "runs" / name / "version_0")):
            try:
                step = read_checkpoint(path)["global_step"]
            except InputError:
                continue
            if step < since - 2:
                break
            return
        self.counts["checkpoints lost"] += 1

    def compare(self, name: str, devices: int = 1) -> None:
        """Compare the final weights with those of a run without faults."""
        if devices not in self.references:
            reference = f"reference-{devices}"
            assert self.finish(self.start(reference, devices)) == 0, (self.folder / "log").read_text()[-2000:]
            path = checkpoint_path(self.folder / "runs" / reference / "version_0", STEPS)
            self.references[devices] = {
                key: value.clone() for key, value in read_checkpoint(path)["state_dict"].items()
            }
        self.counts["runs"] += 1
        path = checkpoint_path(self.folder / "runs" / name / "version_0", STEPS)
        found = read_checkpoint(path)["state_dict"] if path.is_file() else {}
        equal = all(key in found and torch.equal(found[key], value) for key, value in self.references[devices].items())
        self.counts["weights differ"] += not equal
        shutil.rmtree(self.folder / "runs" / name, ignore_errors=True)

    def end(self, name: str, devices: int = 1) -> None:
        """Run to the end without a fault, and compare."""
        status = self.finish(self.start(name, devices))
        self.counts["wrong status"] += status not in (0, None)
        self.compare(name, devices)

    def kill(self, name: str) -> None:
        """SIGKILL at a random time after the first checkpoint of this process; five per run."""
        name = name.replace(" ", "")
        before = self.newest(name)
        process = self.start(name)
        if not self.wait_for_a_checkpoint(name, process, before):
            self.counts["wrong status"] += process.returncode != 0
            self.compare(name)  # it finished before the kill
            return self.kill(name)
        time.sleep(self.rng.uniform(0, 0.6))
        seen = self.newest(name)
        if process.poll() is not None:
            self.compare(name)
            return self.kill(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self.counts["faults"] += 1
        folder = self.folder / "runs" / name / "version_0" / "checkpoints"
        self.counts["during a write"] += any(folder.glob(".*.partial"))
        self.check_loads(name, seen)
        if self.counts["faults"] % 5 == 0:
            self.end(name)
        return None

    def terminate(self, name: str) -> None:
        """SIGTERM to one of two ranks: both save and exit with status 143, and the run resumes."""
        name = "term"
        process = self.start(name, devices=2)
        self.wait_for_a_checkpoint(name, process)
        time.sleep(self.rng.uniform(0, 0.5))
        ranks = [process.pid, *children(process.pid)]
        if process.poll() is None:
            os.kill(self.rng.choice(ranks), signal.SIGTERM)
            self.counts["faults"] += 1
            status = self.finish(process, 60)
            if status not in (143, 0):
                self.counts["wrong status"] += 1
                print(f"status {status} at step {self.newest(name)}: {(self.folder / 'log').read_text()[-1000:]}")
            self.check_loads(name, self.newest(name))
        if self.newest(name) == STEPS:
            self.compare(name, 2)
        else:
            self.end(name, 2)

    def _damage(self, name: str, damage: Callable[[bytearray], bytes]) -> None:
        process = self.start(name)
        self.wait_for_a_checkpoint(name, process, 4)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        path = checkpoints(self.folder / "runs" / name / "version_0")[-1]
        path.write_bytes(damage(bytearray(path.read_bytes())))
        self.counts["faults"] += 1
        self.check_loads(name, self.newest(name))
        self.end(name)

    def truncate(self, name: str) -> None:
        """Truncate the newest checkpoint."""
        self._damage("truncate", lambda content: bytes(content[: self.rng.randrange(len(content))]))

    def flip(self, name: str) -> None:
        """Flip a bit of the newest checkpoint."""

        def damage(content: bytearray) -> bytes:
            content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
            return bytes(content)

        self._damage("flip", damage)

    def fill(self, name: str) -> None:
        """Simulate a full disk: limit the file size to less than that of a checkpoint."""
        name = "full"
        process = self.start(name)
        self.wait_for_a_checkpoint(name, process, 2)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        size = checkpoints(self.folder / "runs" / name / "version_0")[-1].stat().st_size
        seen = self.newest(name)
        status = self.finish(self.start(name, limit=self.rng.randrange(size // 2, size)))
        self.counts["faults"] += 1
        self.counts["during a write"] += 1
        self.counts["wrong status"] += status != 1
        self.check_loads(name, seen)
        self.end(name)


def children(pid: int) -> list[int]:
    """Return the child processes of a process (Linux)."""
    files = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(word) for text in files for word in text.split()]
