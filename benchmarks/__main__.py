"""`python -m benchmarks NAME [options]` runs one of the comparisons."""

from jsonargparse import auto_cli

from benchmarks import bigram, generate

if __name__ == "__main__":
    auto_cli({"bigram": bigram.run, "generate": generate.run}, as_positional=False, prog="python -m benchmarks")
