"""`python -m benchmarks NAME [options]` runs one of the comparisons."""

from jsonargparse import auto_cli

from benchmarks import bigram, generate, loader, prepare

if __name__ == "__main__":
    runs = {"bigram": bigram.run, "generate": generate.run, "loader": loader.run, "prepare": prepare.run}
    auto_cli(runs, as_positional=False, prog="python -m benchmarks")
