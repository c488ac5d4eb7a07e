"""Words by which ``hetermoe train`` knows the lines that rank 0 prints for it."""

PLAN = "hetermoe plan: "  # before what runs where, as JSON
DRY_RUN = "hetermoe dry run: "  # before each line of a dry run's report
