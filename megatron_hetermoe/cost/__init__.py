"""What a task costs: device table, profiles, interpolation, cluster."""
