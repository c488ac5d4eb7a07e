"""What a plan costs: events over the schedule that the executor runs, and the baselines."""
