"""What `alignsae bench` times: our step, its floor, dense baselines, and other trainers in their own environment."""
