"""What `alignsae frontier` trains: our dictionaries, and those of other trainers in their own environment."""
