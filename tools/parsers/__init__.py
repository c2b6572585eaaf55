"""Arguments of the subcommands, apart from their work, so that --help needs no torch; one module each."""
