"""Correctness checks on a GPU: agreement with float64 on the CPU; runs of train.py that stop, resume and shard."""

import math
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
Lines = Iterator[dict[str, Any]]


def correctness(device: str, nanogpt: str | None) -> Lines:
    """Compare with float64 on the CPU: model, loss, clipping, non-finite gradients, generation."""
    for check in (model_against_float64, loss_against_float64, clipping_and_nan, greedy_text):
        try:
            yield {"check": check.__name__, **check(device)}
        except Exception as error:
            yield {"check": check.__name__, "error": f"{type(error).__name__}: {error}"}


def small_model(**more: Any) -> Any:
    """Return a GPTModel of four layers."""
    import torch

    from gptlit import GPTConfig, GPTModel

    torch.manual_seed(1)
    shape = {"vocab_size": 1000, "context_length": 128, "emb_dim": 256, "n_heads": 4, "n_layers": 4}
    return GPTModel(GPTConfig(**shape, drop_rate=0.0, qkv_bias=True, tie_weights=True, init="gpt2", **more))


def relative(found: Any, expected: Any) -> float:
    """Return the relative error in the Euclidean norm."""
    return float((found.double().cpu() - expected).norm() / expected.norm())


def model_against_float64(device: str) -> dict[str, Any]:
    """Loss and gradients in float32 on the device agree with float64 to 1e-5."""
    import torch

    from gptlit.model.loss import linear_cross_entropy

    ids = torch.randint(1000, (4, 129))
    found = {}
    for where, dtype in (("cpu", torch.float64), (device, torch.float32)):
        model = small_model().to(where, dtype)
        inputs, targets = ids[:, :-1].to(where), ids[:, 1:].to(where)
        loss = linear_cross_entropy(model.hidden(inputs), model.out_head.weight, targets)
        loss.backward()
        found[dtype] = [loss.detach(), *(p.grad for p in model.parameters())]
    errors = [relative(*pair) for pair in zip(found[torch.float32], found[torch.float64], strict=True)]
    return {"loss error": errors[0], "largest gradient error": max(errors[1:]), "passed": max(errors) < 1e-5}


def loss_against_float64(device: str) -> dict[str, Any]:
    """The fused loss in each dtype, over several chunks of rows, agrees with the plain loss in float64."""
    import torch

    from gptlit.model import loss as module

    rows = 3 * module.ROWS.get(device, 1024) // 2 if device == "cuda" else 64
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, rows, 64), 0.1 * torch.randn(5003, 64)
    targets = torch.randint(5003, (1, rows))
    targets[0, ::7] = -100
    errors = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = [value.detach().to(device, dtype).clone().requires_grad_() for value in (hidden, weight)]
        exact = [value.detach().double().cpu().requires_grad_() for value in values]
        loss = module.linear_cross_entropy(*values, targets.to(device))
        plain = module.next_token_loss(exact[0] @ exact[1].T, targets)
        (loss * 4096).backward()
        (plain * 4096).backward()
        pairs = [(loss.detach(), plain.detach()), *((v.grad, e.grad) for v, e in zip(values, exact, strict=True))]
        errors[str(dtype)] = [relative(*pair) for pair in pairs]
    limits = {"torch.float32": 1e-5, "torch.bfloat16": 1e-2, "torch.float16": 2e-3}
    return {**errors, "passed": all(max(errors[name]) < limit for name, limit in limits.items())}


def clipping_and_nan(device: str) -> dict[str, Any]:
    """Clipping inside fused AdamW equals torch's; a step with a NaN gradient leaves the weights unchanged."""
    from types import SimpleNamespace

    import torch

    from gptlit import GPTConfig, GPTModule
    from gptlit.training.gradients import clip_gradients

    config = GPTConfig(vocab_size=100, context_length=16, emb_dim=32, n_heads=2, n_layers=2, drop_rate=0.0)
    weights = []
    for is_ours in (True, False):
        torch.manual_seed(3)
        module = GPTModule(config)
        module._trainer = SimpleNamespace(  # type: ignore[assignment]
            precision="32-true", strategy=SimpleNamespace(root_device=torch.device(device))
        )
        module.guard.reset(torch.device(device))
        module.configure_model()
        module.to(device)
        optimizer = module.configure_optimizers()
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape).to(device)
        if is_ours:
            module.guard.check(optimizer, clip_gradients(optimizer, 0.5, "norm"))
        else:
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
        weights.append([p.detach().clone() for p in module.parameters()])
        if is_ours:
            next(module.parameters()).grad.fill_(math.nan)  # type: ignore[union-attr]
            module.guard.check(optimizer, clip_gradients(optimizer, 0.5, "norm"))
            optimizer.step()
            kept = all(torch.equal(a, b) for a, b in zip(weights[0], module.parameters(), strict=True))
    largest = max(float((a - b).abs().max()) for a, b in zip(*weights, strict=True))
    return {"largest difference": largest, "NaN changes nothing": kept, "passed": kept and largest < 1e-6}


def greedy_text(device: str) -> dict[str, Any]:
    """Greedy ids agree: with and without the fast path, and on the CPU."""
    import torch

    from gptlit.generation.fast_linear import for_generation
    from gptlit.generation.generate import stream

    prompts = [[1, 2, 3, 4, 5], [9, 8, 7]]
    found = {}
    for name, where, fast in (("plain", device, False), ("fast", device, device == "cuda"), ("cpu", "cpu", False)):
        model = small_model().eval().to(where, torch.float64)
        if fast:
            for_generation(model, compile=True)
        found[name] = [ids.tolist() for ids in stream(model, prompts, 40, cuda_graph=fast)]
    return {"passed": all(ids == found["cpu"] for ids in found.values())}


# --- reliability --------------------------------------------------------------------------------------------------


def reliability(device: str, nanogpt: str | None) -> Lines:
    """Runs of train.py: bitwise resume, fp16, FSDP2, a signal to the process group."""
    with tempfile.TemporaryDirectory() as folder:
        words = "the a model learns from data to write text about trees and rivers in winter , slowly .".split()
        Path(folder, "words.txt").write_text(" ".join(random.Random(0).choices(words, k=60_000)))
        runs = Runs(Path(folder), device)
        checks = (runs.resumes, runs.half_precision, runs.sharded, runs.stops)
        with ThreadPoolExecutor(len(checks) if device == "cuda" else 1) as pool:
            waiting = {pool.submit(check): check.__name__ for check in checks}
            for future in as_completed(waiting):
                name, error = waiting[future], future.exception()
                yield {"check": name, **({"error": f"{error!r}"[:600]} if error else future.result())}


class Runs:
    """Short runs in a folder."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        accelerator = "gpu" if device == "cuda" else "cpu"
        self.flags = ["--config", str(ROOT / "configs/quickstart.yaml"), "--data.source", str(folder / "words.txt")]
        self.flags += ["--trainer.default_root_dir", str(folder / "runs"), f"--trainer.accelerator={accelerator}"]
        self.flags += ["--trainer.devices=1", "--model.schedule=constant", "--run.val_every_n_steps=20"]
        self.flags += ["--model.config.drop_rate=0.1", "--trainer.enable_progress_bar=true"]
        if device == "cpu":
            self.flags += ["--model.config.n_layers=1", "--model.config.emb_dim=16", "--model.config.n_heads=2"]
            self.flags += ["--model.config.context_length=16", "--data.batch_size=4"]

    def start(self, name: str, *more: str) -> "subprocess.Popen[str]":
        """Start a run."""
        command = [sys.executable, "train.py", "fit", *self.flags, f"--run.name={name}", *more]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, cwd=ROOT, process_group=0)

    def fit(self, name: str, *more: str) -> str:
        """Run to the end; return the output."""
        process = self.start(name, *more)
        output, _ = process.communicate(timeout=100)
        if process.returncode:
            raise RuntimeError(f"{name} ended with {process.returncode}: {output[-400:]}")
        return output

    def weights(self, name: str, step: int) -> dict[str, Any]:
        """Read the weights of a checkpoint."""
        from gptlit.checkpoint.io import read_checkpoint
        from gptlit.checkpoint.runs import checkpoint_path

        path = checkpoint_path(self.folder / "runs" / name / "version_0", step)
        return dict(read_checkpoint(path)["state_dict"])

    def resumes(self) -> dict[str, Any]:
        """40 steps, uninterrupted and resumed, are bitwise equal with `trainer.deterministic`."""
        import torch

        same = {}
        for mode, flag in (("deterministic", "true"), ("free", "false")):
            option = f"--trainer.deterministic={flag}"
            self.fit(f"{mode}-whole", option, "--trainer.max_steps=40", "--run.save_every_n_steps=20")
            self.fit(f"{mode}-parts", option, "--trainer.max_steps=20")
            self.fit(f"{mode}-parts", option, "--trainer.max_steps=40", "--ckpt_path=last")
            whole, parts = self.weights(f"{mode}-whole", 40), self.weights(f"{mode}-parts", 40)
            same[mode] = all(torch.equal(whole[name], parts[name]) for name in whole)
        return {"the same bits": same, "passed": same["deterministic"]}

    def half_precision(self) -> dict[str, Any]:
        """16-mixed trains without NaN."""
        precision = "16-mixed" if self.device == "cuda" else "32-true"
        output = self.fit("half", f"--trainer.precision={precision}", "--trainer.max_steps=40")
        found = [line for line in output.splitlines() if "val/loss" in line]
        return {"lines": found[:3], "passed": "nan" not in output}

    def sharded(self) -> dict[str, Any]:
        """FSDP2 on one device saves and resumes."""
        option = "--trainer.strategy=fsdp2"
        self.fit("sharded", option, "--trainer.max_steps=20")
        self.fit("sharded", option, "--trainer.max_steps=40", "--ckpt_path=last")
        return {"passed": bool(self.weights("sharded", 40))}

    def stops(self) -> dict[str, Any]:
        """SIGTERM to the process group, with DataLoader workers, saves and exits with status 143."""
        process = self.start("stopped", "--trainer.max_steps=100000", "--data.num_workers=2")
        assert process.stdout is not None
        for line in process.stdout:
            if "step 20" in line or "val/loss" in line:
                break
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)
        saved = list((self.folder / "runs/stopped/version_0/checkpoints").glob("step-*.ckpt"))
        return {"status": process.returncode, "saved": len(saved), "passed": process.returncode == 143 and bool(saved)}
