"""`python -m gptlit` is the `gptlit` command."""

from gptlit.commands.main import main

if __name__ == "__main__":
    main()
