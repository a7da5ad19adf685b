"""From a model to text: sampling, generation, evaluation."""

TEMPERATURE, TOP_K = 0.8, 50  # by default: of `generate` (which keeps every token), `chat` and the samples of a run
