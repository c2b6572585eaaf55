"""The `alignsae` command: one module per subcommand."""
