"""Pages to look at: HTML in one file that needs no network, figures with their numbers, one sentence on each."""
