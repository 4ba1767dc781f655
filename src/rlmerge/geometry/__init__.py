"""What training did: coordinate-wise measures, spectra, function space, and a verdict, as one JSON document."""
