"""What `alignsae repack` is made of: foreign samples, their labels and their vectors."""
