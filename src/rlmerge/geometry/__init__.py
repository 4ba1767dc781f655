"""What training did: supports, sizes, conflicts, spectra, function; `inspect` puts the parts into one document."""
