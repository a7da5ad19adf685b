"""`python -m gptlit` is the `gptlit` command."""

from gptlit.cli import main

if __name__ == "__main__":
    main()
