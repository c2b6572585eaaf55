"""Tables behind the synthetic biography benchmark: invented entities and the sentences that mention them."""
