"""From builds to a choice: trials, plans, the rate under an SLO, the race."""
