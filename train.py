"""Train, validate and test: `python train.py fit --config configs/quickstart.yaml`."""

try:
    from gptlit.training.cli import main
except KeyboardInterrupt:  # the imports take seconds
    raise SystemExit(130) from None

if __name__ == "__main__":
    main()
