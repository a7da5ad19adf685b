"""The `gptlit` command, one file for each subcommand."""
