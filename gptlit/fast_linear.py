"""Linear layers for generation: one row at a time, a product reads every weight once, and memory is the limit."""

from gptlit.model import GPTModel


def for_generation(model: GPTModel, quantize: str | None) -> GPTModel:
    """Return the model as it is."""
    return model
