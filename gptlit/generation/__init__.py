"""From a model to text: sampling, generation, evaluation."""

TEMPERATURE = 0.8  # default of `generate`, `chat` and the samples of a run
TOP_K = 50  # default of `chat` and the samples of a run
