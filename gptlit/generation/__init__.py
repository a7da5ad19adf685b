"""From a model to text: sampling, generation, evaluation."""
