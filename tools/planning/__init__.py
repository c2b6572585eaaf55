"""What `alignsae plan` computes."""
