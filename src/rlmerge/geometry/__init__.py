"""What training did to a model: coordinates, spectra, and the function around the weights."""
