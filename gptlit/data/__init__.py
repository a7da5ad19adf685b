"""From text to batches: corpus -> tokens -> windows -> datamodule."""
