"""The model: plain torch, neither Lightning nor files."""
