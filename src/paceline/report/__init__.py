"""Reports: a run's records in, a page or an event file out."""
