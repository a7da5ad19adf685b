"""`python -m benchmarks NAME [options]` runs one of the benchmarks."""

from jsonargparse import auto_cli

from benchmarks import bigram, curves, devices, faults, footprint, generate, gpu, prepare, profile, saves, step

RUNS = {
    "bigram": bigram.run,
    "bitwise": faults.bitwise,
    "devices": devices.run,
    "faults": faults.run,
    "footprint": footprint.run,
    "generate": generate.run,
    "gpu": gpu.run,
    "ladder": step.ladder,
    "memory": devices.memory,
    "numerics": curves.numerics,
    "overhead": step.overhead,
    "prepare": prepare.run,
    "profile": profile.run,
    "saves": saves.run,
    "step": step.run,
    "time_to_loss": curves.time_to_loss,
}

if __name__ == "__main__":
    auto_cli(RUNS, as_positional=False, prog="python -m benchmarks")
