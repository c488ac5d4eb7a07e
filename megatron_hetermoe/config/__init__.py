"""What a run is told: model shape, pools, plan, flags. Plain dataclasses."""
