"""Matrix-free curvature: Hessian operators, Lanczos, spectra and condition numbers."""
