"""Study of the paper's claims with small models that train on a CPU."""
