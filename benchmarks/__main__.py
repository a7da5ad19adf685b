"""`python -m benchmarks NAME [options]` runs one of the comparisons."""

from jsonargparse import auto_cli

from benchmarks import bigram, devices, faults, generate, loader, prepare, saves, step

if __name__ == "__main__":
    benchmarks = (bigram, devices, faults, generate, loader, prepare, saves, step)
    runs = {module.__name__.removeprefix("benchmarks."): module.run for module in benchmarks}
    runs["bitwise"] = faults.bitwise
    runs["memory"] = devices.memory
    auto_cli(runs, as_positional=False, prog="python -m benchmarks")
