"""Rules between techniques, by what they are about; `paceline.plan.check` has the table of them."""
